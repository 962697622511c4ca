"""What every evaluation leaves behind: the predictions on disk, and one result of the same keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from frozenprefix.data.images import BadImages
from frozenprefix.data.samples import Sample
from frozenprefix.evaluation.journal import Journal
from frozenprefix.evaluation.scoring import Scorer, Scores, intervals
from frozenprefix.evaluation.tasks.registry import EvaluationOptions
from frozenprefix.inference.captioner import batched
from frozenprefix.kernels.allocator import keep_freed_memory

T = TypeVar("T")
#: Run ("model", or the name of a baseline) → sample id → what was predicted: a text, or another plain JSON value.
Predictions = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Evaluated:
    """What is evaluated, and how predictions become scores.

    Attributes:
        task: its name.
        samples: those that are scored; each is a row of the predictions file.
        score: predictions of one run → their scores.
        settings: what the predictions were made with.
        bad: the images that could not be read.
        drawn: sample id → what the bootstrap draws as a whole; a sample's images when not given.
        chance: metrics of guessing, which are known without any run.
        more: predictions → further keys of the result.
    """

    task: str
    samples: Sequence[Sample]
    score: Scorer
    settings: Mapping[str, Any]
    bad: BadImages
    drawn: Mapping[str, Hashable] | None = None
    chance: Mapping[str, float] | None = None
    more: Callable[[Predictions], dict[str, Any]] | None = None


def evaluate_runs(
    what: Evaluated,
    predict: Callable[[Journal], Predictions],
    header: Mapping[str, Any],
    options: EvaluationOptions,
) -> dict[str, Any]:
    """Let all processes predict with a journal, and the main one write and score.

    Args:
        predict: called in every process; what it returns is of all processes in the main one.
        header: what the predictions depend on, see `Journal`.

    Returns:
        `result_of`, the same in every process.
    """
    keep_freed_memory()
    with Journal(options.predictions, header, processes=options.processes, restart=options.restart) as journal:
        made = predict(journal)
        result = []
        if options.processes.is_main:
            result = [result_of(what, made, options.predictions)]
            journal.remove()
    return options.processes.gather(result)[0]


def predict_missing(
    journal: Journal,
    todo: Mapping[str, Sequence[T]],
    answer: Callable[[str, list[T]], Mapping[str, Any]],
    options: EvaluationOptions,
    *,
    key: Callable[[T], str],
    batch_size: int,
) -> Predictions:
    """Predict what the journal does not have, each process its share of the batches, and gather it all.

    Args:
        todo: run → what is to be predicted, in an order in which neighbours may share a batch.
        answer: predictions by id for a batch of a run.
        key: the id of an item.
    """
    share = slice(options.processes.rank, None, options.processes.count)
    batches = []
    for run, items in todo.items():
        left = [item for item in items if (run, key(item)) not in journal.made]
        batches += [(run, batch) for batch in list(batched(left, batch_size))[share]]
    done = len(journal.made)
    total = done + sum(len(batch) for _, batch in batches)
    for run, batch in batches:
        journal.add(run, answer(run, batch))
        done += len(batch)
        if options.progress is not None:
            options.progress(done, total)
    return journal.gather()


def result_of(what: Evaluated, made: Predictions, predictions: Path) -> dict[str, Any]:
    """Write predictions, score them, write them again with their scores, and say all that in plain JSON.

    Returns:
        As `EvaluationTask.run` says; "model" is the run whose scores are `metrics`, the others are baselines.
    """
    write_predictions(predictions, what.samples, made)
    scored = {name: what.score(run) for name, run in made.items()}
    write_predictions(predictions, what.samples, made, scored)
    baselines: dict[str, Any] = {name: scores.metrics for name, scores in scored.items() if name != "model"}
    if what.chance is not None:
        baselines["chance"] = dict(what.chance)
    drawn = {sample.id: sample.images for sample in what.samples} if what.drawn is None else what.drawn
    return {
        "task": what.task,
        "metrics": scored["model"].metrics,
        "intervals": intervals(scored["model"], drawn),
        "baselines": baselines,
        "n": len(what.samples),
        "groups": {name: scores.groups for name, scores in scored.items() if scores.groups},
        "bad_images": what.bad.counts,
        "settings": dict(what.settings),
        "predictions": str(predictions),
        "predictions_sha256": hashlib.sha256(predictions.read_bytes()).hexdigest(),
        **({} if what.more is None else what.more(made)),
    }


def write_predictions(
    path: Path, samples: Sequence[Sample], made: Predictions, scored: Mapping[str, Scores] | None = None
) -> None:
    """One JSON object per sample: id, images, question, references, each run's prediction.

    A chat has its `history`, the right turns before. When they are scored there are `scores` (run → metric → score of
    this sample) and `statistics` of the model's run.
    """
    rows = []
    for sample in samples:
        row: dict[str, Any] = {
            "id": sample.id,
            "images": [str(image) for image in sample.images],
            **({} if sample.history is None else {"history": sample.history}),
            "question": sample.question,
            "references": list(sample.targets),
            **{name: run[sample.id] for name, run in made.items()},
        }
        if scored is not None:
            row["scores"] = {name: each.per_sample.get(sample.id, {}) for name, each in scored.items()}
            row["statistics"] = {kind: of[sample.id] for kind, of in scored["model"].statistics.items()}
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.new")
    aside.write_text("".join(rows), encoding="utf-8")
    aside.replace(path)
