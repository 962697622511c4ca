"""Metrics, and one evaluator per task."""

from frozenprefix.evaluation.bootstrap import bootstrap_interval, paired_bootstrap
from frozenprefix.evaluation.evaluate import evaluate_checkpoint, evaluate_samples
from frozenprefix.evaluation.metrics.hf import load_metric
from frozenprefix.evaluation.tasks.registry import TASKS, EvaluationOptions, EvaluationTask

__all__ = [
    "TASKS",
    "EvaluationOptions",
    "EvaluationTask",
    "bootstrap_interval",
    "evaluate_checkpoint",
    "evaluate_samples",
    "load_metric",
    "paired_bootstrap",
]
