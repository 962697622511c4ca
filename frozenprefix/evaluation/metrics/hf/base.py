"""Base class of the metrics as `evaluate.Metric`s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import evaluate
from datasets import Features, Value
from datasets import Sequence as ListOf

TEXT = Value("string")
TEXTS = ListOf(Value("string"))
VECTOR = ListOf(Value("float32"))
COLUMNS = ListOf(Value("int64"))


class OfflineMetric(evaluate.Metric):
    """A metric of this package. A subclass sets `inputs` and `citation` and writes `_compute`.

    Args:
        options: those of `evaluate.Metric`. What is added stays in memory, unless several processes add to one metric.
    """

    inputs: ClassVar[Features | list[Features]]
    citation_text: ClassVar[str]

    def __init__(self, *, num_process: int = 1, keep_in_memory: bool | None = None, **options: Any):
        keep = num_process == 1 if keep_in_memory is None else keep_in_memory
        super().__init__(num_process=num_process, keep_in_memory=keep, **options)

    def _info(self) -> evaluate.MetricInfo:
        text = (type(self)._compute.__doc__ or "").strip()
        return evaluate.MetricInfo(
            description=(type(self).__doc__ or "").strip(),
            citation=self.citation_text,
            inputs_description=text,
            features=self.inputs,
        )


def numbered(items: Sequence[Any]) -> dict[str, Any]:
    """Items by their place: `evaluate` knows no ids."""
    return {str(i): item for i, item in enumerate(items)}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
