"""Evaluators with arguments of their own, as tasks of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frozenprefix.data.samples import Sample
from frozenprefix.errors import ConfigError, did_you_mean
from frozenprefix.evaluation.retrieval import evaluate_retrieval
from frozenprefix.evaluation.tasks import EvaluationOptions, EvaluationTask
from frozenprefix.inference.embedding import Embedder

_RETRIEVAL_OPTIONS = ("recall_at",)


def run_retrieval(embedder: Embedder, samples: Sequence[Sample], options: EvaluationOptions) -> dict[str, Any]:
    """`evaluate_retrieval`. A rank depends on all candidates, so that there are no intervals and no predictions file.

    Raises:
        ConfigError: for an option that it does not have, or several processes.
    """
    for name in options.extra:
        if name not in _RETRIEVAL_OPTIONS:
            known = f"{did_you_mean(name, _RETRIEVAL_OPTIONS)}; known: {', '.join(_RETRIEVAL_OPTIONS)}"
            raise ConfigError(f"task 'retrieval' has no option {name!r}{known}")
    if options.processes.count > 1:
        raise ConfigError(f"task 'retrieval' runs in one process, got {options.processes.count}; start it alone")
    return {
        **evaluate_retrieval(embedder, samples, max_bad_share=options.max_bad_share, **options.extra),
        "intervals": {},
    }


def _load_embedder(checkpoint: str | Path, device: str | None) -> Embedder:
    return Embedder.from_pretrained(checkpoint, device=device)


RETRIEVAL = EvaluationTask(run_retrieval, sample_task="caption", load=_load_embedder)
