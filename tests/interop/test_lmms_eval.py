"""lmms-eval itself, on a local caption task of real photos: the same texts and the same scores as `evaluate`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from frozenprefix.config import load_recipe
from frozenprefix.data import load_source
from frozenprefix.evaluation import evaluate_checkpoint
from frozenprefix.evaluation.metrics import caption_metrics
from frozenprefix.training import train
from frozenprefix.utils import read_jsonl, write_jsonl
from tests.helpers import ROOT

#: lmms-eval, and what its evaluation imports of its fifty requirements, some of which conflict with ours (av).
LMMS_EVAL = [
    "lmms-eval>=0.7.3,<0.8",
    "filelock<4",
    "loguru",
    "sacrebleu",
    "portalocker",
    "tabulate",
    "colorama",
    "lxml",
]
LMMS_EVAL += ["pytz", "tenacity", "pytablewriter", "DataProperty", "mbstrdecoder", "pathvalidate", "tabledata"]
LMMS_EVAL += ["tcolorpy", "typepy", "chardet", "python-dateutil"]
PHOTOS = 8


def test_the_entry_point_names_the_manifest():
    points = {point.name: point.value for point in entry_points(group="lmms_eval.models")}
    assert points.get("frozenprefix") == "frozenprefix.interop.lmms_eval:MANIFEST", "run: pip install -e ."


@pytest.fixture(scope="module")
def photos(data_root, tmp_path_factory) -> Path:
    """A folder with the first validation photos of Flickr8k."""
    folder = tmp_path_factory.mktemp("photos")
    rows = [row for _, row in read_jsonl(data_root / "flickr8k" / "captions.jsonl") if row["split"] == "val"]
    write_jsonl(folder / "captions.jsonl", rows[:PHOTOS])
    (folder / "images").symlink_to((data_root / "flickr8k" / "images").resolve())
    return folder


@pytest.fixture(scope="module")
def checkpoint(data_root, tmp_path_factory) -> Path:
    """EfficientNet-Lite0 and SmolLM2 with a mapper that has seen a few photos: fluent captions of the wrong things."""
    source = f"{{type: captions, path: {data_root / 'flickr8k'}, split: train, limit: 48}}"
    recipe = load_recipe(
        ROOT / "recipes" / "mlp.yaml",
        [
            f"output_dir={tmp_path_factory.mktemp('run')}",
            f"data.train=[{source}]",
            "data.validation=[]",
            *("training.epochs=null", "training.max_steps=4", "training.warmup_steps=2", "training.precision=fp32"),
            *("training.max_minutes=null", "training.early_stopping_patience=null", "training.targets_per_image=2"),
        ],
    )
    return train(recipe).best


@pytest.fixture(scope="module")
def lmms_eval(tmp_path_factory) -> Path:
    """A folder for PYTHONPATH with lmms-eval: in the environment of the tests it would change versions."""
    folder = tmp_path_factory.mktemp("lmms_eval")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*pip, *LMMS_EVAL], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.slow
@pytest.mark.network
def test_lmms_eval_gives_the_same_captions_and_scores(photos, checkpoint, lmms_eval, tmp_path):
    page = (ROOT / "docs" / "evaluation_tools.md").read_text(encoding="utf-8")
    names: dict = {}
    exec("".join(re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)), names)
    names["save_task"](load_source({"type": "captions", "path": str(photos)}), tmp_path / "data" / "lmms_captions")
    shutil.copytree(ROOT / "recipes" / "lmms_eval", tmp_path / "tasks")

    arguments = f"pretrained={checkpoint},prompt=caption,precision=fp32"
    command = [sys.executable, "-m", "lmms_eval", "--model", "frozenprefix", "--model_args", arguments]
    command += ["--tasks", "own_captions", "--include_path", "tasks", "--device", "cpu", "--batch_size", "8"]
    paths = os.pathsep.join([str(lmms_eval), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "--output_path", "out", "--log_samples"],
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    results = next((tmp_path / "out").rglob("*results.json"), None)
    assert results is not None, done.stderr[-3000:]  # it ends with 0 where it failed, too
    (samples,) = (tmp_path / "out").rglob("*samples_own_captions.jsonl")
    theirs = json.loads(results.read_text())["results"]["own_captions"]
    logged = [row["CIDEr"] for _, row in read_jsonl(samples)]
    captions = {row["id"]: row["prediction"] for row in logged}

    # its scorers (pycocoevalcap's, with Java's tokenizer where there is Java) against the metrics of this package
    references = {row["id"]: row["captions"] for row in logged}
    ours = caption_metrics(captions, references).corpus
    names = {"CIDEr": "cider_d", "Bleu_4": "bleu_4", "ROUGE_L": "rouge_l"}
    for name, own in names.items():
        assert theirs[f"{name},none"] == pytest.approx(ours[own], abs=1e-6)

    # and the whole way, from photos to scores, against `evaluate`
    predictions = tmp_path / "predictions.jsonl"
    whole = evaluate_checkpoint(checkpoint, task="caption", data=photos, precision="fp32", predictions=predictions)
    assert captions == {row["id"]: row["model"].strip() for _, row in read_jsonl(predictions)}
    for name, own in names.items():
        assert theirs[f"{name},none"] == pytest.approx(whole["metrics"][own], abs=1e-6)
