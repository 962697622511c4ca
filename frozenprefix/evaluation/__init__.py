"""Metrics, and one evaluator per task."""

from frozenprefix.evaluation.evaluate import evaluate_checkpoint, evaluate_samples

__all__ = ["evaluate_checkpoint", "evaluate_samples"]
