"""Every recipe that is shipped: it is read without a problem, and runs under `accelerate launch`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.recipes import small_parts
from frozenprefix.config import load_recipe
from frozenprefix.data.samples import Sample
from frozenprefix.data.sources import load_source
from frozenprefix.models.configuration import MapperConfig
from frozenprefix.models.mappers import build_mapper
from tests.helpers import ROOT
from tests.test_quickstart import COLORS, draw_easy_vqa

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# what a run in small needs beside the small parts: (recipe) -> overrides
SMALL = {
    "adalora": [f"model.language_model.peft.{key}=1" for key in ("tinit", "tfinal", "deltaT")],
    "capdec": ["model.vision_encoder.name=ViT-B-32", "model.vision_encoder.image_size=32"],
    "dialog": ["training.init_from=null"],
    "few_shot": ["training.init_from=null"],
    "grounding": ["training.init_from=null"],
    "quickstart": ["data.prompts={caption: 'Caption:'}"],
    "self_critical": ["training.init_from=null"],
    "smallcap": ["training.init_from=null"],
    "video": ["training.init_from=null"],
}  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_recipe_is_read_and_says_what_it_is(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.output_dir == Path("runs") / path.stem
    assert recipe.training.max_minutes is None, "a run by the clock cannot be repeated bit for bit"
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) <= 120


def script(name: str):
    """A script of `recipes/` as a module."""
    spec = spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def samples_of(recipe: str, data: Path, base: Path) -> list[Sample]:
    """What a recipe's first training source reads, written by the script that the recipe names."""
    path = ROOT / "recipes" / f"{recipe}.yaml"
    command = re.search(r"python recipes/drawings\.py (\w+) (\S+)", path.read_text())
    assert command is not None
    drawings = script("drawings")
    drawings.COUNTS = {recipe: {"train": 60, "val": 2}}
    drawings.main([command[1], str(base / command[2]), "--data", str(data)])
    return load_source(load_recipe(path).data.train[0], base=base)


def test_prompts_of_the_few_shot_recipe(tmp_path):
    """The script writes what the recipe's data source reads: three images a prompt, and names bound anew in each."""
    data = draw_easy_vqa(tmp_path / "easy", 240)
    for path in data.rglob("*.png"):
        with Image.open(path) as image:
            image.putpixel((0, 0), (int(path.stem), 0, 0))  # a copy of the query is never in the support
            image.save(path)
    samples = samples_of("few_shot", data, tmp_path)
    assert len(samples) == 60
    bound = set()
    for sample in samples:
        assert sample.prompt == "{question}"
        shots = re.fullmatch(
            r"Answer with (\w+) or (\w+)\.<image>This is a (\w+)\.<image>This is a (\w+)\."
            r"<image>Question: What is this\? Answer: This is a",
            sample.question or "",
        )
        assert shots is not None, sample.question
        first, second = shots.groups()[2:]
        assert {first, second} == set(shots.groups()[:2])
        assert len(set(sample.images)) == 3
        # the drawings come in turns of six: equal numbers modulo 6 are the same colour and shape
        kinds = [int(path.stem) % 6 for path in sample.images]
        assert sample.targets == ({kinds[0]: first, kinds[1]: second}[kinds[2]],)
        bound.add((kinds[2], sample.targets[0]))
    assert len(bound) > 6, "a class has more than one name"


def test_chats_of_the_dialog_recipe(tmp_path):
    """Five turns about two drawings, the second shown at the third turn; the last reply is about the first drawing."""
    samples = samples_of("dialog", draw_easy_vqa(tmp_path / "easy", 60), tmp_path)
    for turns in zip(*[iter(samples)] * 5, strict=True):
        assert [len(sample.images) for sample in turns] == [1, 1, 2, 2, 2]
        last = turns[-1]
        assert last.question
        assert last.history is not None
        assert [answer for _, answer in last.history] == [sample.targets[0] for sample in turns[:4]]
        first = {"shape": turns[0], "color": turns[1]}[last.question.split()[1]]
        assert last.targets[0] == first.targets[0].replace(" is ", " was ")
        shown = [int(path.stem) for path in last.images]
        colours = [turns[place].targets[0] for place in (1, 3)]
        assert colours == [f"It is {COLORS[number % 3]}." for number in shown]


def test_clips_of_the_video_recipe(tmp_path):
    """Frames are in order: the drawing goes where the caption says, and the video files show the same."""
    av = pytest.importorskip("av")
    samples = samples_of("video", draw_easy_vqa(tmp_path / "easy", 60), tmp_path)
    for sample in samples:
        centres = []
        for path in sample.images:
            with Image.open(path) as image:
                far = np.abs(np.asarray(image).astype(int) - 255).sum(-1) > 100  # from the white ground
                centres.append(np.argwhere(far).mean(0))
        (down, right), way = centres[-1] - centres[0], sample.targets[0].split()[-1]
        assert {"right": right, "left": -right, "down": down, "up": -down}[way] > 20
        assert min(abs(down), abs(right)) < 1
    with av.open(str(tmp_path / "data/clips/val_0000.mp4")) as container:
        assert len(list(container.decode(video=0))) == 16


def test_drawings_and_start_of_the_grounding_recipe(tmp_path, tiny_lm):
    """Boxes are around the shapes, shapes do not overlap, and the fitted mapper writes phrases and boxes as words."""
    samples = samples_of("grounding", draw_easy_vqa(tmp_path / "easy", 60), tmp_path)
    assert len(samples) == 3 * 60
    for sample in samples[:30]:
        with Image.open(sample.images[0]) as image:
            pixels = np.asarray(image).astype(int)
        left, top, right, bottom = (round(value * 128) for value in sample.metadata["box"])
        colour = ("red", "green", "blue").index(sample.metadata["phrase"].split()[1])
        mine = (pixels[..., colour] > 120) & (np.delete(pixels, colour, axis=2).max(axis=-1) < 100)
        rows, columns = np.nonzero(mine)
        found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert np.abs(np.array(found) - (left, top, right, bottom)).max() <= 1
    grounding = script("grounding")
    texts = grounding.texts_of(samples[:12])
    lines = next(iter(texts.values())).splitlines()
    assert [line.split()[1] for line in lines] == ["blue", "green", "red"]
    mapper = build_mapper(
        MapperConfig(type="mlp", prefix_length=5, hidden_dim=64, tokens="flatten", activation="gelu", input_norm=True),
        encoder_dim=6, num_tokens=4, lm_dim=16, embedding_rms=1.0,
    )  # fmt: skip
    words, features = torch.randn(20, 16), torch.randn(12, 4, 6)
    ids = torch.randint(0, 20, (12, 5))
    grounding.fit(mapper, features, words[ids], ridge=1e-6)
    with torch.no_grad():
        assert torch.equal((mapper(features) @ words.T / words.norm(dim=1)).argmax(-1), ids)


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
        "training.validation_images=4",
        *SMALL.get(path.stem, []),
    ]
    recipe = load_recipe(path)
    frozen = (
        recipe.kind == "prefix" and recipe.model.language_model.peft is None and recipe.model.fusion.type != "adapters"
    )
    if recipe.kind == "prefix":
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
