"""Every recipe that is shipped: it is read without a problem, and runs under `accelerate launch`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.recipes import small_parts
from frozenprefix.training.kinds import load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# what a run in small needs beside the small parts: (recipe) -> overrides
SMALL = {
    "adalora": [f"model.language_model.peft.{key}=1" for key in ("tinit", "tfinal", "deltaT")],
    "capdec": ["model.vision_encoder.name=ViT-B-32", "model.vision_encoder.image_size=32"],
    "quickstart": ["data.prompts={caption: 'Caption:'}"],
    "self_critical": ["training.init_from=null"],
    "smallcap": ["training.init_from=null"],
}  # fmt: skip
ADAPTED = {"peft", "adapters"}  # words in a recipe by which something in its language model is trained


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_recipe_is_read_and_says_what_it_is(path):
    _, recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.output_dir == Path("runs") / path.stem
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) <= 120


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_recipe_runs_in_small_under_accelerate(path, tmp_path):
    changes = [
        *small_parts(path, tmp_path),
        f"output_dir={tmp_path / 'run'}",
        "training.epochs=null",
        "training.max_minutes=null",
        "training.max_steps=3",
        "training.warmup_steps=0",
        "training.log_every=1",
        "training.validate_every=3",
        "training.validation_pictures=4",
        *SMALL.get(path.stem, []),
    ]
    frozen = "language_model" in path.read_text() and not ADAPTED & set(re.findall(r"\w+", path.read_text()))
    if "kind: contrastive" not in path.read_text():
        (tmp_path / "text.txt").write_text("a dog runs in the street and a man sits on the grass. " * 20)
        changes.append(f"evaluation.text={tmp_path / 'text.txt'}")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "recipes" / "train.py"), str(path)]
    done = subprocess.run(
        [*command, *changes], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {0, 1, 2, 3}
    assert (tmp_path / "run" / "best" / "config.json").is_file()
    if "evaluation.text" in changes[-1]:
        text = json.loads((tmp_path / "run" / "text_ability.json").read_text())
        same = text["before"]["logits_sha256"] == text["after"]["logits_sha256"]
        assert same is frozen, "a LM without adapters computes the same on text, to the bit; one with them does not"
