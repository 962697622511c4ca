"""Metrics of captions and answers: plain functions over dicts of strings, on numpy and the standard library."""

from frozenprefix.evaluation.metrics.captions import CaptionScores, caption_metrics
from frozenprefix.evaluation.metrics.ptb import ptb_tokenize
from frozenprefix.evaluation.metrics.references import CaptionReferences
from frozenprefix.evaluation.metrics.vqa import by_group, exact_match, normalize_vqa_answer, vqa_accuracy

__all__ = [
    "CaptionReferences",
    "CaptionScores",
    "by_group",
    "caption_metrics",
    "exact_match",
    "normalize_vqa_answer",
    "ptb_tokenize",
    "vqa_accuracy",
]
