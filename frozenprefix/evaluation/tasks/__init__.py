"""One evaluator per task. A new task is an `EvaluationTask` in a module of its own, and one line here."""

from __future__ import annotations

from frozenprefix.evaluation.task import EvaluationTask
from frozenprefix.evaluation.tasks.captioning import CAPTION, evaluate_captions
from frozenprefix.evaluation.tasks.classification import CLASSIFICATION, evaluate_classification
from frozenprefix.evaluation.tasks.few_shot import FEW_SHOT, evaluate_fewshot
from frozenprefix.evaluation.tasks.few_shot_episodes import (
    SimilarExamples,
    binding_episodes,
    fast_vqa_episodes,
    similar_episodes,
)
from frozenprefix.evaluation.tasks.grounding import GROUNDING, evaluate_grounding
from frozenprefix.evaluation.tasks.retrieval import RETRIEVAL, evaluate_retrieval, retrieval_metrics
from frozenprefix.evaluation.tasks.video import VIDEO, evaluate_video
from frozenprefix.evaluation.tasks.vqa import VQA, evaluate_vqa
from frozenprefix.registry import Registry

__all__ = [
    "TASKS",
    "SimilarExamples",
    "binding_episodes",
    "evaluate_captions",
    "evaluate_classification",
    "evaluate_fewshot",
    "evaluate_grounding",
    "evaluate_retrieval",
    "evaluate_video",
    "evaluate_vqa",
    "fast_vqa_episodes",
    "retrieval_metrics",
    "similar_episodes",
]

TASKS: Registry[EvaluationTask] = Registry("evaluation task")
for _name, _task in {
    "caption": CAPTION,
    "classification": CLASSIFICATION,
    "fewshot": FEW_SHOT,
    "grounding": GROUNDING,
    "retrieval": RETRIEVAL,
    "video": VIDEO,
    "vqa": VQA,
}.items():
    TASKS.register(_name)(_task)
