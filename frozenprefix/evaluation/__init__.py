"""Metrics, and one evaluator per task."""

from frozenprefix.evaluation.bootstrap import bootstrap_interval, paired_bootstrap
from frozenprefix.evaluation.comparison import Evaluation, compare
from frozenprefix.evaluation.evaluate import encode_samples, evaluate_checkpoint, evaluate_samples
from frozenprefix.evaluation.metrics.hf import load_metric
from frozenprefix.evaluation.task import EvaluationOptions, EvaluationTask
from frozenprefix.evaluation.tasks import TASKS
from frozenprefix.evaluation.text_ability import TextAbility, text_ability, text_perplexity

__all__ = [
    "TASKS",
    "Evaluation",
    "EvaluationOptions",
    "EvaluationTask",
    "TextAbility",
    "bootstrap_interval",
    "compare",
    "encode_samples",
    "evaluate_checkpoint",
    "evaluate_samples",
    "load_metric",
    "paired_bootstrap",
    "text_ability",
    "text_perplexity",
]
