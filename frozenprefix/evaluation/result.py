"""The output of every evaluation: a file of predictions, and a result with the same keys for all tasks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import gather_object

from frozenprefix.data.images import BadImages
from frozenprefix.data.samples import Sample
from frozenprefix.evaluation.journal import Journal
from frozenprefix.evaluation.scoring import Scorer, Scores, intervals
from frozenprefix.evaluation.task import EvaluationOptions
from frozenprefix.inference.captioner import batched
from frozenprefix.kernels.allocator import keep_freed_memory
from frozenprefix.utils import content_hash, progress_bar, write_jsonl

T = TypeVar("T")
#: Run ("model", or the name of a baseline) → sample id → prediction: a text, or another plain JSON value.
Predictions = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class ScoredTask:
    """The samples of a task, and how their predictions are scored.

    Attributes:
        task: name of the task.
        samples: each is a row of the predictions file.
        score: predictions of one run → their scores.
        settings: what the predictions depend on.
        bad: the images that could not be read.
        clusters: sample id → what the bootstrap draws as a whole; by default a sample's images.
        chance: metrics of guessing, which need no run.
        more: predictions → further keys of the result.
    """

    task: str
    samples: Sequence[Sample]
    score: Scorer
    settings: Mapping[str, Any]
    bad: BadImages
    clusters: Mapping[str, Hashable] | None = None
    chance: Mapping[str, float] | None = None
    more: Callable[[Predictions], dict[str, Any]] | None = None


def evaluate_runs(
    scored: ScoredTask,
    predict: Callable[[Journal], Predictions],
    header: Mapping[str, Any],
    options: EvaluationOptions,
) -> dict[str, Any]:
    """Predict in all processes with a journal; write and score in the main one.

    Args:
        predict: called in every process; in the main one it returns the predictions of all.
        header: what the predictions depend on; see `Journal`.

    Returns:
        `result_of`, the same in every process.
    """
    keep_freed_memory()
    journal = Journal(options.predictions, header, processes=options.processes, restart=options.restart)
    predictions = predict(journal)
    result = []
    if options.processes.is_main_process:
        scored.bad.report(f"task '{scored.task}'", len(_images(scored.samples)) + len(scored.bad))
        with progress_bar("scoring"):
            result = [result_of(scored, predictions, options.predictions)]
        journal.remove()
    return gather_object(result)[0]


def _images(samples: Sequence[Sample]) -> set[Path]:
    return {image for sample in samples for image in sample.images}


def predict_missing(
    journal: Journal,
    todo: Mapping[str, Sequence[T]],
    answer: Callable[[str, list[T]], Mapping[str, Any]],
    options: EvaluationOptions,
    *,
    key: Callable[[T], str],
    batch_size: int,
) -> Predictions:
    """Predict what the journal lacks, each process its share of the batches, and gather the predictions of all.

    Args:
        todo: run → items to predict, in an order in which neighbours may share a batch.
        answer: predictions by id for a batch of a run.
        key: the id of an item.
    """
    batches = []
    for run, items in todo.items():
        left = [item for item in items if (run, key(item)) not in journal.known]
        batches += [(run, batch) for batch in batched(left, batch_size)]

    def answer_batch(batch: tuple[str, list[T]]) -> dict[tuple[str, str], Any]:
        run, items = batch
        return {(run, name): value for name, value in answer(run, items).items()}

    return predict_batches(journal, batches, answer_batch, options, count=lambda batch: len(batch[1]))


def predict_batches(
    journal: Journal,
    batches: Sequence[T],
    answer: Callable[[T], Mapping[tuple[str, str], Any]],
    options: EvaluationOptions,
    *,
    count: Callable[[T], int],
) -> Predictions:
    """Predict batches that the journal lacks, each process its share, and gather the predictions of all.

    Args:
        answer: (run, id) → prediction for a batch.
        count: how many predictions a batch gives.
    """
    share = list(batches)[options.processes.process_index :: options.processes.num_processes]
    done = len(journal.known)
    total = done + sum(map(count, share))
    for batch in share:
        predictions = answer(batch)
        journal.add(predictions)
        done += len(predictions)
        if options.progress is not None:
            options.progress(done, total)
    return journal.gather()


def result_of(scored: ScoredTask, predictions: Predictions, path: Path) -> dict[str, Any]:
    """Write predictions, score them, and write them again with their scores.

    Returns:
        As `EvaluationTask.run` says; "model" is the run whose scores are `metrics`, the others are baselines.
    """
    write_predictions(path, scored.samples, predictions)
    scores = {name: scored.score(run) for name, run in predictions.items()}
    write_predictions(path, scored.samples, predictions, scores)
    baselines: dict[str, Any] = {name: each.metrics for name, each in scores.items() if name != "model"}
    if scored.chance is not None:
        baselines["chance"] = dict(scored.chance)
    clusters = {sample.id: sample.images for sample in scored.samples} if scored.clusters is None else scored.clusters
    return {
        "task": scored.task,
        "metrics": scores["model"].metrics,
        "intervals": intervals(scores["model"], clusters),
        "baselines": baselines,
        "n": len(scored.samples),
        "groups": {name: each.groups for name, each in scores.items() if each.groups},
        "bad_images": scored.bad.counts,
        "settings": dict(scored.settings),
        "predictions": str(path),
        "predictions_sha256": content_hash(path.read_bytes()),
        **({} if scored.more is None else scored.more(predictions)),
    }


def write_predictions(
    path: Path, samples: Sequence[Sample], predictions: Predictions, scores: Mapping[str, Scores] | None = None
) -> None:
    """Write one JSON object per sample: id, images, question, references, each run's prediction.

    A chat has its `history`, the reference turns before. Scored predictions have `scores` (run → metric → score of
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
            **{name: run[sample.id] for name, run in predictions.items()},
        }
        if scores is not None:
            row["scores"] = {name: each.per_sample.get(sample.id, {}) for name, each in scores.items()}
            row["statistics"] = {kind: values[sample.id] for kind, values in scores["model"].statistics.items()}
        rows.append(row)
    write_jsonl(path, rows)
