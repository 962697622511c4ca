"""Grounding: the model says where something is, as a box in text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from frozenprefix.data.boxes import Box, boxes_in, overlap
from frozenprefix.data.samples import Sample
from frozenprefix.errors import DataError
from frozenprefix.evaluation.journal import Journal, header_of
from frozenprefix.evaluation.result import Predictions, ScoredTask, evaluate_runs
from frozenprefix.evaluation.samples import check_samples_of
from frozenprefix.evaluation.scoring import Scorer, Scores, mean
from frozenprefix.evaluation.task import EvaluationOptions, EvaluationTask, check_options
from frozenprefix.evaluation.tasks.runs import generate_settings, generating, lm_settings, predict_runs
from frozenprefix.inference.captioner import Captioner

#: A box is found if it overlaps the true one by at least this share of their union (Yu et al. 2016).
FOUND = 0.5
#: Four numbers of up to three digits, with blanks and the end.
_TOKENS = 24


def evaluate_grounding(captioner: Captioner, samples: Sequence[Sample], options: EvaluationOptions) -> dict[str, Any]:
    """Ask where things are, and compare the first box of each answer with the true one.

    Runs: "model", "blind" and "shuffled" (see `runs.predict_runs`). An answer without a box counts as not found.

    Args:
        samples: of task "vqa" with one image, and the true box in `metadata["box"]` or as target; `refcoco` gives them.

    Returns:
        As `EvaluationTask.run` says, with the metrics `accuracy` (overlap of at least 0.5), `iou` (mean overlap) and
        `boxes` (share of answers with a box).

    Raises:
        ConfigError: for a task option, and for samples of another task.
        DataError: for a sample without a box, or with several images.

    Example:
        >>> sample = Sample("1", (image_path,), ("10 10 90 90",), question="Where is the circle?", task="vqa")
        >>> other = Sample("2", (images_folder / "blue_cross.png",), ("5 5 95 95",), question="Where?", task="vqa")
        >>> options = EvaluationOptions(tmp_path / "predictions.jsonl", max_new_tokens=2)
        >>> sorted(evaluate_grounding(captioner, [sample, other], options)["metrics"])
        ['accuracy', 'boxes', 'iou']
    """
    check_options("grounding", options.extra, ())
    samples = check_samples_of(samples, "vqa")
    truth = {sample.id: true_box(sample) for sample in samples}
    generate = generate_settings(options, num_beams=1, max_new_tokens=_TOKENS)
    settings: dict[str, Any] = {**generate, **lm_settings(captioner)}
    images = options.open_features(captioner, samples)
    samples = [sample for sample in samples if sample.images[0] not in images.bad]

    def predict_all(journal: Journal) -> Predictions:
        return predict_runs(captioner, samples, generating(captioner, images, generate), journal, options)

    scored = ScoredTask("grounding", samples, box_scorer({s.id: truth[s.id] for s in samples}), settings, images.bad)
    return evaluate_runs(scored, predict_all, header_of(captioner, samples, {"task": "grounding", **settings}), options)


GROUNDING = EvaluationTask(evaluate_grounding, sample_task="vqa", takes_beams=True)


def true_box(sample: Sample) -> Box:
    """The box of a sample.

    Raises:
        DataError: for a sample without one, or with several images, in one of which it would have to be.

    Example:
        >>> true_box(Sample("1", (image_path,), ("10 20 30 40",)))
        (0.1, 0.2, 0.3, 0.4)
    """
    if len(sample.images) != 1:
        raise DataError(f"{sample.label}: got {len(sample.images)} images, expected one, in which the box is")
    if "box" in sample.metadata:
        left, top, right, bottom = sample.metadata["box"]
        return left, top, right, bottom
    found = [box for target in sample.targets for box in boxes_in(target)]
    if not found:
        raise DataError(
            f"{sample.label}: got the target {sample.targets[0]!r}, expected a box such as '12 30 55 80', percent of "
            "the image (left, top, right, bottom); data source 'refcoco' writes such targets"
        )
    return found[0]


def box_scorer(truth: Mapping[str, Box]) -> Scorer:
    """Accuracy at an overlap of 0.5, mean overlap, and the share of answers with a box.

    Example:
        >>> box_scorer({"1": (0.1, 0.1, 0.9, 0.9)})({"1": "at 10 10 90 85"}).metrics
        {'accuracy': 1.0, 'iou': 0.9375, 'boxes': 1.0}
    """

    def score(texts: Mapping[str, str]) -> Scores:
        per_sample = {}
        for key, box in truth.items():
            found = boxes_in(texts[key])[:1]
            shared = round(overlap(found[0], box), 6) if found else 0.0
            per_sample[key] = {"accuracy": float(shared >= FOUND), "iou": shared, "boxes": float(bool(found))}
        names = ("accuracy", "iou", "boxes")
        return Scores({name: mean(row[name] for row in per_sample.values()) for name in names}, per_sample=per_sample)

    return score
