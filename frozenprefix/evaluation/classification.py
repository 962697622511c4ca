"""Score a model as a classifier, with the blind LM's and the shuffled pictures' scores beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from frozenprefix.data.features import PictureFeatures
from frozenprefix.data.samples import Sample, check_unique_ids
from frozenprefix.errors import ConfigError, DataError, did_you_mean
from frozenprefix.evaluation.confusion import confusion_svg
from frozenprefix.evaluation.generation import Texts, open_features, shuffled, write_predictions
from frozenprefix.evaluation.journal import Journal, header_of
from frozenprefix.evaluation.metrics.classification import classification_report
from frozenprefix.evaluation.scoring import Scores, intervals
from frozenprefix.evaluation.tasks import EvaluationOptions, EvaluationTask
from frozenprefix.inference.captioner import Captioner, batched
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
    """Classify the picture of every sample and compare with its target.

    Blind: the label that the LM finds likeliest without a picture. Shuffled: a sample is given the label of the
    picture of a sample half the list away, never its own. Chance: one over the number of labels.

    Args:
        labels: all that can be chosen; the targets that occur, sorted, when not given.
        templates, calibrate, normalise, end_token: see `Classifier`.

    Returns:
        As `EvaluationTask.run` says, with precision, recall and F1 of each label as groups, and `confusion`: `labels`,
        `counts` (rows true, columns predicted) and `file`, a drawing of them beside the predictions.

    Raises:
        ConfigError: for samples of another task.
        DataError: for a sample without exactly one picture and one target, or whose target is no label.
    """
    labels = _checked_labels(samples, labels)
    classifier = Classifier(
        captioner.model,
        captioner.processor,
        templates=templates,
        calibrate=calibrate,
        normalise=normalise,
        end_token=end_token,
        batch_size=captioner.batch_size,
    )
    settings = {
        "templates": classifier.templates, "calibrate": calibrate, "normalise": normalise, "end_token": end_token
    }  # fmt: skip
    pictures = open_features(captioner, samples, options)
    samples = [sample for sample in samples if sample.images[0] not in pictures.bad]
    header = header_of(captioner, samples, {"task": "classification", "labels": labels, **settings})
    with Journal(options.predictions, header, processes=options.processes, restart=options.restart) as journal:
        texts = _choose(classifier, samples, labels, pictures, journal, options)
        result = None
        if options.processes.is_main:
            result = _result(samples, labels, texts, pictures, options.predictions)
            result["settings"] = {**settings, "labels": len(labels)}
            journal.remove()
    return options.processes.gather([] if result is None else [result])[0]


def _run(captioner: Captioner, samples: Sequence[Sample], options: EvaluationOptions) -> dict[str, Any]:
    unknown = [name for name in options.extra if name not in OPTIONS]
    if unknown:
        raise ConfigError(
            f"task 'classification' has no option {unknown[0]!r}{did_you_mean(unknown[0], OPTIONS)}; "
            f"known: {', '.join(OPTIONS)}"
        )
    return evaluate_classification(captioner, samples, options, **options.extra)


CLASSIFICATION = EvaluationTask(_run, sample_task="classification")


def _checked_labels(samples: Sequence[Sample], labels: Sequence[str] | None) -> list[str]:
    check_unique_ids(samples)
    tasks = {sample.task for sample in samples}
    if tasks != {"classification"}:
        got = ", ".join(sorted(tasks)) or "no sample"
        raise ConfigError(f"evaluate_classification takes samples of task 'classification', got {got}")
    for sample in samples:
        if len(sample.images) != 1 or len(sample.targets) != 1:
            raise DataError(
                f"sample {sample.id}: got {len(sample.images)} pictures and {len(sample.targets)} targets, expected "
                "one picture and its label"
            )
    found = sorted({sample.targets[0] for sample in samples})
    unknown = [name for name in found if labels is not None and name not in labels]
    if labels is not None and unknown:
        raise DataError(
            f"labels: {unknown[0]!r} is a sample's target but no label{did_you_mean(unknown[0], labels)}; "
            f"expected all of {', '.join(found[:20])}"
        )
    return found if labels is None else list(labels)


def _choose(
    classifier: Classifier,
    samples: Sequence[Sample],
    labels: list[str],
    pictures: PictureFeatures,
    journal: Journal,
    options: EvaluationOptions,
) -> Texts:
    """Run → sample id → label. A picture is classified once, for its own samples and those that it is shuffled to."""
    first = {sample.images[0]: sample for sample in reversed(samples)}
    asked = [sample for sample in first.values() if ("model", sample.id) not in journal.made]
    share = list(batched(asked, classifier.batch_size))[options.processes.rank :: options.processes.count]
    done = len(journal.made)
    total = done + sum(map(len, share))
    for batch in share:
        scores = classifier.scores(pictures([sample.images[0] for sample in batch]), labels)
        chosen = scores.argmax(dim=1).tolist()
        journal.add("model", {sample.id: labels[i] for sample, i in zip(batch, chosen, strict=True)})
        done += len(batch)
        if options.progress is not None:
            options.progress(done, total)
    made = journal.gather()["model"]
    blind = labels[int(classifier.blind_scores(labels).argmax())]
    return {
        "model": {sample.id: made[first[sample.images[0]].id] for sample in samples},
        "blind": {sample.id: blind for sample in samples},
        "shuffled": {
            sample.id: made[first[other.images[0]].id] for sample, other in zip(samples, shuffled(samples), strict=True)
        },
    }


def _result(
    samples: Sequence[Sample], labels: list[str], texts: Texts, pictures: PictureFeatures, predictions: Path
) -> dict[str, Any]:
    write_predictions(predictions, samples, texts)
    truth = {sample.id: sample.targets[0] for sample in samples}
    reports = {
        name: classification_report([made[key] for key in truth], list(truth.values()), labels)
        for name, made in texts.items()
    }
    scored = {name: _scores(report, texts[name], truth) for name, report in reports.items()}
    write_predictions(predictions, samples, texts, scored)
    drawing = predictions.with_name(f"{predictions.stem}_confusion.svg")
    drawing.write_text(confusion_svg(labels, reports["model"]["confusion"]), encoding="utf-8")
    return {
        "task": "classification",
        "metrics": scored["model"].metrics,
        "intervals": intervals(scored["model"], {sample.id: sample.images for sample in samples}),
        "baselines": {
            **{name: scores.metrics for name, scores in scored.items() if name != "model"},
            "chance": {"accuracy": 1 / len(labels)},
        },
        "n": len(samples),
        "groups": {name: scores.groups for name, scores in scored.items()},
        "bad_pictures": pictures.bad.counts,
        "predictions": str(predictions),
        "predictions_sha256": hashlib.sha256(predictions.read_bytes()).hexdigest(),
        "confusion": {"labels": labels, "counts": reports["model"]["confusion"], "file": str(drawing)},
    }


def _scores(report: dict[str, Any], made: Mapping[str, str], truth: Mapping[str, str]) -> Scores:
    return Scores(
        metrics={name: value for name, value in report.items() if isinstance(value, float)},
        groups={table: {label: row[table] for label, row in report["per_class"].items()} for table in TABLES},
        per_sample={key: {"accuracy": float(made[key] == label)} for key, label in truth.items()},
    )
