"""The log of experiments on captions of photos: one line of `quality.md` for each run, failed ones included.

    frozenprefix train recipes/flickr8k/NAME.yaml
    frozenprefix evaluate runs/NAME/best --task caption --option metrics='[meteor]' --out runs/NAME/captions.json
    python benchmarks/experiments.py runs/NAME [runs/OTHER ...]

Figures of a run are kept in `benchmarks/experiments/NAME.json`, and the tables, one for each kind of processor, are
written anew from all of these files. Loss and evidence are those of the step that `best/` was kept at. Minutes are
those of the training loop, validation included, and count the runs that it started from (`training.init_from`), as
captions do. "Evidence" is the gain in the log-probability of a caption's token, in nats, that the right image brings
over another one, on the validation images.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from frozenprefix.interpret.card import Run, read_run
from frozenprefix.training import read_log

FOLDER = Path(__file__).with_name("experiments")
PAGE = Path(__file__).with_name("quality.md")
SECTION = "experiments"
SCORES = {"bleu_4": "BLEU-4", "meteor": "METEOR", "cider_d": "CIDEr-D"}


def figures(folder: Path) -> dict[str, Any]:
    """What the table says of one run.

    Args:
        folder: its output folder, with log.jsonl, best/ and a result of `frozenprefix evaluate --task caption`.
    """
    run = read_run(folder)
    found: dict[str, Any] = {
        "name": run.recipe.name,
        "starts_from": Path(run.recipe.training.init_from).parent.name if run.recipe.training.init_from else None,
        "minutes": run.progress.get("seconds", 0.0) / 60,
        "captions": run.progress.get("targets_seen", 0),
        "trained": trained_parameters(run),
        "processor": common.machine()["processor_kind"],
        **validation_at(read_log(folder), run.progress.get("best_step", 0)),
        **caption_scores(run),
    }
    return found


def trained_parameters(run: Run) -> int:
    """Number of weights that the checkpoint holds: those that were trained."""
    with safe_open(run.checkpoint / "model.safetensors", framework="np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping


def validation_at(log: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """The validation loss at a step, and how much higher it was for wrong images."""
    rows = [row for row in log if row["step"] == step and "validation/loss" in row]
    if not rows:
        return {}
    return {
        "loss": rows[-1]["validation/loss"],
        "evidence": rows[-1]["validation/shuffled_loss"] - rows[-1]["validation/loss"],
    }


def caption_scores(run: Run) -> dict[str, Any]:
    """Scores of the captions of the run's evaluation, of the shuffled ones, and how different the captions are."""
    results = [evaluation for evaluation in run.evaluations if evaluation.result["task"] == "caption"]
    if not results:
        raise SystemExit(f"{run.checkpoint}: no result of `frozenprefix evaluate --task caption --out FILE` beside it")
    evaluation = results[-1]
    metrics, shuffled = evaluation.result["metrics"], evaluation.result["baselines"].get("shuffled", {})
    return {
        **{name: metrics[name] for name in SCORES if name in metrics},
        "images": len(evaluation.rows),
        "shuffled_cider_d": shuffled.get("cider_d"),
        "distinct": metrics["distinct_captions"],
        "most_frequent": metrics["most_common_share"],
        "words": metrics["mean_length"],
    }


def table(runs: Sequence[Mapping[str, Any]], by_name: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each run, the best last; minutes and captions with those of the runs that it started from."""

    def total(run: Mapping[str, Any], key: str) -> float:
        before = by_name.get(run["starts_from"])
        return run[key] + (total(before, key) if before is not None and before is not run else 0)

    header = ["try", "minutes", "captions", "trained", "loss", "evidence", *SCORES.values()]
    header += ["shuffled", "distinct", "most frequent", "words"]
    rows = []
    for run in sorted(runs, key=lambda run: run.get("cider_d", 0.0)):
        rows.append(
            [
                f"[{run['name']}](../recipes/flickr8k/{run['name']}.yaml)",
                f"{total(run, 'minutes'):.0f}",
                f"{total(run, 'captions'):,.0f}",
                f"{run['trained'] / 1e6:.1f} M",
                *(run.get(key, "") for key in ("loss", "evidence")),
                *(f"{run[key]:.3f}" if key in run else "" for key in (*SCORES, "shuffled_cider_d")),
                f"{run['distinct']} of {run['images']}",
                f"{100 * run['most_frequent']:.1f} %",
                f"{run['words']:.1f}",
            ]
        )
    return common.table(header, rows)


def main(argv: Sequence[str] | None = None, *, folder: Path = FOLDER, page: Path = PAGE) -> str:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="output folders; none to write the table only"
    )
    arguments = options.parse_args(argv)
    folder.mkdir(exist_ok=True)
    for run in arguments.runs:
        found = figures(run)
        (folder / f"{found['name']}.json").write_text(json.dumps(found, indent=2) + "\n")
    runs = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    tables = {}
    for processor in sorted({run["processor"] for run in runs.values()}):
        tables[processor] = table([run for run in runs.values() if run["processor"] == processor], runs)
        common.write_section(page, SECTION, processor, tables[processor])
    return "\n".join(f"{processor}\n{text}" for processor, text in tables.items())


if __name__ == "__main__":
    print(main())
