"""Training steps saved by a closed-form start: one mapper trained from random weights and from the closed form.

python benchmarks/closed_form_start.py [--json report.json] [--steps 80]

Needs Flickr8k (FROZENPREFIX_DATA) and real weights: a classifier with random weights knows no classes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.learning_curve import passes
from frozenprefix import FrozenPrefixConfig, FrozenPrefixProcessor, train
from frozenprefix.config import load_recipe
from frozenprefix.training import read_log

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
VALIDATIONS, IMAGES = 8, 48


def closed_form(photo: Path, folder: Path) -> Path:
    """Run `recipes/closed_form.py` on a photo, and return its checkpoint."""
    command = [sys.executable, RECIPES / "closed_form.py", photo, "--output", folder]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def curve(start: Path, data: Path, folder: Path, steps: int, *, from_start: bool) -> dict[int, float]:
    """Validation loss by step, for the mapper and the prompt of the checkpoint `start`."""
    mapper = FrozenPrefixConfig.from_pretrained(start).mapper
    prompt = FrozenPrefixProcessor.from_pretrained(start).prompts["caption"]
    settings = {
        "model.mapper": mapper,
        "data.train.0.path": str(data),
        "data.validation.0.path": str(data),
        "data.prompts.caption": prompt,
        "training.epochs": None,
        "training.max_minutes": None,
        "training.max_steps": steps,
        "training.validate_every": max(1, steps // VALIDATIONS),
        "training.validation_images": IMAGES,
        "training.init_from": str(start) if from_start else None,
        "output_dir": str(folder),
    }
    changes = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    result = train(load_recipe(RECIPES / "mlp.yaml", changes), resume="never")
    lines = read_log(result.output_dir)
    return {line["step"]: line["validation/loss"] for line in lines if "validation/loss" in line}


def saved_steps(plain: dict[int, float], closed: dict[int, float]) -> dict[int, float | None]:
    """Steps saved at each validation of the closed-form start.

    That is the interpolated step at which the random start reaches the same loss, minus the step of the validation;
    None if it never does.
    """
    reached = {step: passes(loss, sorted(plain.items())) for step, loss in closed.items()}
    return {step: None if at is None else at - step for step, at in reached.items()}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    root = os.environ.get("FROZENPREFIX_DATA")
    if not root:
        raise SystemExit("FROZENPREFIX_DATA is not set: no real photos to measure on")
    data = Path(root) / "flickr8k"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        start = closed_form(min((data / "images").iterdir()), folder / "start")
        plain = curve(start, data, folder / "plain", arguments.steps, from_start=False)
        closed = curve(start, data, folder / "closed", arguments.steps, from_start=True)
    return {"random": plain, "closed_form": closed, "steps_saved": saved_steps(plain, closed)}


def markdown(report: dict[str, Any]) -> str:
    rows = [
        [
            step,
            report["random"][step],
            loss,
            "not reached" if report["steps_saved"][step] is None else report["steps_saved"][step],
        ]
        for step, loss in report["closed_form"].items()
    ]
    return common.table(["step", "loss, random start", "loss, closed-form start", "steps saved"], rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=int, default=80)
    arguments = parser.parse_args(argv)
    return common.publish(run, arguments, "closed_form", markdown)


if __name__ == "__main__":
    main()
