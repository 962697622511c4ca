"""Visual question answering: the model writes answers, or chooses among candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from frozenprefix.data.samples import Sample
from frozenprefix.errors import ConfigError
from frozenprefix.evaluation.journal import Journal, digest, header_of
from frozenprefix.evaluation.result import Predictions, ScoredTask, evaluate_runs
from frozenprefix.evaluation.samples import check_samples_of
from frozenprefix.evaluation.scoring import vqa_scorer
from frozenprefix.evaluation.task import EvaluationOptions, EvaluationTask, check_options
from frozenprefix.evaluation.tasks.candidates import CANDIDATES, candidate_answers, choose
from frozenprefix.evaluation.tasks.runs import Asked, generate_settings, generating, lm_settings, predict_runs
from frozenprefix.inference.captioner import Captioner


def evaluate_vqa(captioner: Captioner, samples: Sequence[Sample], options: EvaluationOptions) -> dict[str, Any]:
    """Answer samples of task "vqa", in the runs "model", "blind" and "shuffled" (see `runs.predict_runs`).

    Args:
        options: `extra` takes `answering`: "generate" (the default) lets the LM write, "choose" takes the likeliest of
            `candidates` (the sum over an answer's tokens and its end): how many of the most common targets of
            `options.train_samples` (100), or a list of answers.

    Returns:
        As `EvaluationTask.run` says.

    Raises:
        ConfigError: for samples of another task, or an option that the task or the way of answering does not have.
        DataError: for ids that occur twice, or no training samples to choose answers from.

    Example:
        >>> from frozenprefix.evaluation.samples import folder_samples
        >>> options = EvaluationOptions(tmp_path / "predictions.jsonl", num_beams=1, max_new_tokens=2)
        >>> evaluate_vqa(captioner, folder_samples(data_folder, "vqa", limit=2), options)["n"]
        4
    """
    check_options("vqa", options.extra, ("answering", "candidates"))
    samples = check_samples_of(samples, "vqa")
    answers = _candidates(options)
    generate = generate_settings(options, num_beams=1, max_new_tokens=10)
    settings: dict[str, Any] = {"answering": "generate", **generate, **lm_settings(captioner)}
    if answers is not None:
        settings = {"answering": "choose", "candidates": len(answers)}
    images = options.open_features(captioner, samples)
    samples = [sample for sample in samples if not any(path in images.bad for path in sample.images)]

    def choose_answer(batch: Sequence[Asked]) -> list[list[str]]:
        return choose(captioner, batch, images, answers or [])

    def predict_all(journal: Journal) -> Predictions:
        answer = generating(captioner, images, generate) if answers is None else choose_answer
        return predict_runs(captioner, samples, answer, journal, options)

    listed = None if answers is None else digest(answers)
    header = header_of(captioner, samples, {"task": "vqa", **settings, "list of candidates": listed})
    scored = ScoredTask("vqa", samples, vqa_scorer(samples), settings, images.bad)
    return evaluate_runs(scored, predict_all, header, options)


def _uses_train(extra: Mapping[str, Any]) -> bool:
    """Whether candidates are taken from the training samples."""
    return extra.get("answering") == "choose" and not isinstance(extra.get("candidates"), list | tuple)


VQA = EvaluationTask(evaluate_vqa, sample_task="vqa", uses_train=_uses_train, takes_beams=True)


def _candidates(options: EvaluationOptions) -> list[str] | None:
    """The answers to choose from; None when the LM writes them."""
    answering = options.extra.get("answering", "generate")
    if answering not in ("generate", "choose"):
        raise ConfigError(f"answering: got {answering!r}, expected 'generate' or 'choose'")
    if answering == "generate":
        if "candidates" in options.extra:
            raise ConfigError("candidates: nothing is chosen with answering='generate'; set answering=choose")
        return None
    for name in ("num_beams", "max_new_tokens"):
        if getattr(options, name) is not None:
            raise ConfigError(f"{name}: nothing is generated with answering='choose'; leave it out")
    return candidate_answers(options.extra.get("candidates", CANDIDATES), options.train_samples)
