"""Targets that a recipe needs to reach a validation loss, with and without changes to it.

    python benchmarks/learning_curve.py [--recipe recipes/quickstart.yaml] [--arm NAME=CHANGE;CHANGE ...] [--steps 450]
        [--seeds 3] [--loss L] [--json FILE] [--quick]

An arm is a name and changes to the recipe, as `frozenprefix train` takes them: `--arm "muon=training.optimizer=muon"`.
The first arm is the recipe as it is. All arms of a seed start from the same weights and see the same targets in the
same order, in runs of the same length. Validation runs `--points` times; the targets at which a curve first passes the
loss are interpolated between two validations. The loss is by default the best that the recipe itself reaches, of the
seed that reaches least, so that the question is: how many targets does a change save? Recipes on photos need
FROZENPREFIX_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from frozenprefix import train
from frozenprefix.config import load_recipe
from frozenprefix.training import read_log

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
AS_IT_IS = "the recipe"
Curve = list[tuple[int, float]]  # targets seen, validation loss


def parse_arm(text: str) -> tuple[str, list[str]]:
    """`NAME=CHANGE;CHANGE` -> the name, and the changes."""
    name, equals, changes = text.partition("=")
    if not equals or "=" not in changes:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=KEY=VALUE;KEY=VALUE")
    return name, changes.split(";")


def curve(recipe: Path, changes: list[str], folder: Path) -> Curve:
    """Validation loss by targets seen, of one run."""
    result = train(load_recipe(recipe, [*changes, f"output_dir={folder}"]), resume="never")
    seen, points = 0, []
    for line in read_log(result.output_dir):
        seen += int(line.get("targets", 0))
        if "validation/loss" in line:
            points.append((seen, line["validation/loss"]))
    return points


def passes(loss: float, points: Sequence[tuple[int, float]]) -> float | None:
    """Where a curve first passes the loss, interpolated; None if it never does."""
    for (before, high), (after, low) in pairwise(points):
        if low <= loss:
            share = (high - loss) / (high - low) if high > low else 0.0
            return before + max(0.0, share) * (after - before)
    return None


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    arms = {AS_IT_IS: [], **dict(arguments.arm)}
    steps, seeds = (4, 1) if arguments.quick else (arguments.steps, arguments.seeds)
    length = [
        "training.epochs=null",
        f"training.max_steps={steps}",
        f"training.validate_every={max(1, steps // arguments.points)}",
        f"training.save_every={steps}",
        "training.log_every=1",
    ]
    root = os.environ.get("FROZENPREFIX_DATA")
    raw = load_recipe(arguments.recipe, arguments.change).data.train[0]
    if str(raw.get("path", "")).startswith("data/"):
        if not root:
            raise SystemExit("FROZENPREFIX_DATA is not set: no photos to measure on")
        path = str(Path(root) / Path(raw["path"]).relative_to("data"))
        length += [f"data.{part}.0.path={json.dumps(path)}" for part in ("train", "validation")]
    curves: dict[str, list[Curve]] = {name: [] for name in arms}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(seeds):
            for number, (name, changes) in enumerate(arms.items()):
                changed = [*length, f"seed={seed}", *arguments.change, *changes]
                curves[name].append(curve(arguments.recipe, changed, Path(scratch) / f"{number}-{seed}"))
    best = [min(loss for _, loss in points) for points in curves[AS_IT_IS]]
    goal = arguments.loss or max(best)
    needed = {name: [passes(goal, points) for points in listed] for name, listed in curves.items()}
    return {
        "recipe": arguments.recipe.name,
        "steps": steps,
        "loss": goal,
        "targets_to_loss": needed,
        "best_loss": {name: [min(loss for _, loss in points) for points in listed] for name, listed in curves.items()},
        "curves": curves,
        **({"note": "quick: a few steps; it shows only that the script works"} if arguments.quick else {}),
    }


def markdown(report: dict[str, Any]) -> str:
    def median(values: list[float | None]) -> float | str:
        reached = [value for value in values if value is not None]
        if len(reached) < len(values):
            return f"reached by {len(reached)} of {len(values)}"
        return statistics.median(reached)

    own = median(report["targets_to_loss"][AS_IT_IS])
    rows = []
    for name, needed in report["targets_to_loss"].items():
        targets = median(needed)
        share = targets / own if isinstance(targets, float) and isinstance(own, float) else ""
        rows.append([name, targets, share, statistics.median(report["best_loss"][name])])
    head = f"{report['recipe']}, {report['steps']} steps, validation loss {report['loss']:.3f}.\n\n"
    return head + common.table(["arm", "targets to the loss", "share", "best loss"], rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__)
    parser.add_argument("--recipe", type=Path, default=RECIPES / "quickstart.yaml")
    parser.add_argument("--arm", type=parse_arm, action="append", default=[], help="NAME=KEY=VALUE;KEY=VALUE")
    parser.add_argument("--change", action="append", default=[], help="KEY=VALUE, for all arms")
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--points", type=int, default=15, help="validations of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--loss", type=float, help="by default what the recipe itself reaches")
    return common.publish(run, parser.parse_args(argv), "learning_curve", markdown)


if __name__ == "__main__":
    main()
