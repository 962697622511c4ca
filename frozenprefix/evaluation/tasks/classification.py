"""Score a model as a classifier, against the blind LM and shuffled images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from frozenprefix.data.features import ImageFeatures
from frozenprefix.data.samples import Sample
from frozenprefix.errors import DataError, did_you_mean
from frozenprefix.evaluation.confusion import draw_confusion
from frozenprefix.evaluation.journal import Journal, header_of
from frozenprefix.evaluation.metrics.classification import classification_report
from frozenprefix.evaluation.result import Predictions, ScoredTask, evaluate_runs, predict_missing
from frozenprefix.evaluation.samples import check_samples_of
from frozenprefix.evaluation.scoring import Scores
from frozenprefix.evaluation.task import EvaluationOptions, EvaluationTask, check_options
from frozenprefix.evaluation.tasks.runs import shuffled
from frozenprefix.inference.captioner import Captioner
from frozenprefix.inference.classifier import Classifier, Normalise

TABLES = ("precision", "recall", "f1")
OPTIONS = ("labels", "templates", "calibrate", "normalise", "end_token")


def evaluate_classification(
    captioner: Captioner,
    samples: Sequence[Sample],
    options: EvaluationOptions,
    *,
    labels: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    calibrate: bool = False,
    normalise: Normalise = "sum",
    end_token: bool = False,
) -> dict[str, Any]:
    """Classify the image of every sample and compare with its target.

    Baselines: "blind", the label that the LM finds likeliest without an image; "shuffled", the label predicted for the
    image of a sample half the list away, never its own; "chance", one over the number of labels.

    Args:
        labels: all labels to choose from; by default the targets that occur, sorted.
        templates, calibrate, normalise, end_token: see `Classifier`.

    Returns:
        As `EvaluationTask.run` says, with precision, recall and F1 of each label as groups, and `confusion`: `labels`,
        `counts` (rows true, columns predicted) and `file`, a drawing of them beside the predictions.

    Raises:
        ConfigError: for samples of another task.
        DataError: for a sample without exactly one image and one target, or whose target is not a label.

    Example:
        >>> files = sorted(images_folder.iterdir())[:2]
        >>> samples = [Sample(file.name, (file,), ("red",), task="classification") for file in files]
        >>> options = EvaluationOptions(tmp_path / "predictions.jsonl")
        >>> result = evaluate_classification(captioner, samples, options, labels=["red", "blue"])
        >>> result["n"], result["baselines"]["chance"]
        (2, {'accuracy': 0.5})
    """
    samples = check_samples_of(samples, "classification")
    names = _check_labels(samples, labels)
    settings: dict[str, Any] = {"calibrate": calibrate, "normalise": normalise, "end_token": end_token}
    classifier = Classifier(
        captioner.model, captioner.processor, templates=templates, batch_size=captioner.batch_size, **settings
    )
    settings["templates"] = classifier.templates
    images = options.open_features(captioner, samples)
    samples = [sample for sample in samples if sample.images[0] not in images.bad]
    truth = {sample.id: sample.targets[0] for sample in samples}
    scored = ScoredTask(
        "classification",
        samples,
        lambda labels_of_run: _scores(labels_of_run, truth, names),
        {**settings, "labels": len(names)},
        images.bad,
        chance={"accuracy": 1 / len(names)},
        more=lambda predictions: {"confusion": _confusion(predictions["model"], truth, names, options.predictions)},
    )
    header = header_of(captioner, samples, {"task": "classification", "labels": names, **settings})
    return evaluate_runs(
        scored, lambda journal: _choose(classifier, samples, names, images, journal, options), header, options
    )


def _run(captioner: Captioner, samples: Sequence[Sample], options: EvaluationOptions) -> dict[str, Any]:
    check_options("classification", options.extra, OPTIONS)
    return evaluate_classification(captioner, samples, options, **options.extra)


CLASSIFICATION = EvaluationTask(_run, sample_task="classification")


def _check_labels(samples: Sequence[Sample], labels: Sequence[str] | None) -> list[str]:
    for sample in samples:
        if len(sample.images) != 1 or len(sample.targets) != 1:
            raise DataError(
                f"sample {sample.id}: got {len(sample.images)} images and {len(sample.targets)} targets, expected "
                "one image and its label"
            )
    targets = sorted({sample.targets[0] for sample in samples})
    if labels is None:
        return targets
    unknown = [name for name in targets if name not in labels]
    if unknown:
        raise DataError(
            f"labels: {unknown[0]!r} is a sample's target but not a label{did_you_mean(unknown[0], labels)}; "
            f"expected all of {', '.join(targets[:20])}"
        )
    return list(labels)


def _choose(
    classifier: Classifier,
    samples: Sequence[Sample],
    labels: list[str],
    images: ImageFeatures,
    journal: Journal,
    options: EvaluationOptions,
) -> Predictions:
    """Run → sample id → label. Each image is classified once, for its own samples and for the shuffled ones."""
    first = {sample.images[0]: sample for sample in reversed(samples)}

    def answer(_: str, batch: list[Sample]) -> dict[str, str]:
        scores = classifier.scores(images([sample.images[0] for sample in batch]), labels)
        return {sample.id: labels[i] for sample, i in zip(batch, scores.argmax(dim=1).tolist(), strict=True)}

    todo = {"model": list(first.values())}
    predictions = predict_missing(
        journal, todo, answer, options, key=lambda sample: sample.id, batch_size=classifier.batch_size
    )["model"]
    blind = labels[int(classifier.blind_scores(labels).argmax())]
    return {
        "model": {sample.id: predictions[first[sample.images[0]].id] for sample in samples},
        "blind": {sample.id: blind for sample in samples},
        "shuffled": {
            sample.id: predictions[first[other.images[0]].id]
            for sample, other in zip(samples, shuffled(samples), strict=True)
        },
    }


def _scores(predicted: Mapping[str, str], truth: Mapping[str, str], labels: Sequence[str]) -> Scores:
    report = _report(predicted, truth, labels)
    return Scores(
        metrics={name: value for name, value in report.items() if isinstance(value, float)},
        groups={table: {label: row[table] for label, row in report["per_class"].items()} for table in TABLES},
        per_sample={key: {"accuracy": float(predicted[key] == label)} for key, label in truth.items()},
    )


def _report(predicted: Mapping[str, str], truth: Mapping[str, str], labels: Sequence[str]) -> dict[str, Any]:
    return classification_report([predicted[key] for key in truth], list(truth.values()), labels)


def _confusion(
    predicted: Mapping[str, str], truth: Mapping[str, str], labels: Sequence[str], file: Path
) -> dict[str, Any]:
    """Counts, and a drawing of them beside `file`, the predictions."""
    counts = _report(predicted, truth, labels)["confusion"]
    drawing = file.with_name(f"{file.stem}_confusion.svg")
    draw_confusion(labels, counts, drawing)
    return {"labels": list(labels), "counts": counts, "file": str(drawing)}
