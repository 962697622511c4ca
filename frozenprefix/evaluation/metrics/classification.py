"""Accuracy, and precision, recall and F1 of every class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from frozenprefix.errors import DataError


def classification_report(
    predictions: Sequence[str | int], references: Sequence[str | int], labels: Sequence[str | int] | None = None
) -> dict[str, Any]:
    """Compare predicted with true labels. A ratio without anything to divide by is 0, as in scikit-learn.

    Args:
        labels: all classes, in the order of the table; by default those that occur, sorted.

    Returns:
        `accuracy`; `macro_precision`, `macro_recall`, `macro_f1` (means over classes); `weighted_precision`,
        `weighted_recall`, `weighted_f1` (weighted by how often a class is true); `per_class`: label →
        `precision`, `recall`, `f1`, `support`; `labels` and `confusion`: int counts, rows true, columns predicted.

    Raises:
        DataError: for lists of different or no length, or a label that is not one of `labels`.

    Example:
        >>> report = classification_report(["cat", "dog", "dog"], ["cat", "cat", "dog"])
        >>> report["confusion"], round(report["accuracy"], 3)
        ([[1, 1], [0, 1]], 0.667)
    """
    if len(predictions) != len(references) or not references:
        raise DataError(
            f"predictions and references must be equally long and not empty, got {len(predictions)} and "
            f"{len(references)}"
        )
    names = sorted({*predictions, *references}, key=lambda name: (str(type(name)), name)) if labels is None else labels
    row = {name: i for i, name in enumerate(names)}
    unknown = [name for name in (*predictions, *references) if name not in row]
    if unknown or len(row) != len(names):
        problem = f"does not name {unknown[0]!r}" if unknown else "names a class twice"
        raise DataError(f"labels {problem}; expected every class once, got {list(names)}")
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confusion, ([row[name] for name in references], [row[name] for name in predictions]), 1)
    hits, support, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    columns = {"precision": _ratio(hits, predicted), "recall": _ratio(hits, support)}
    columns["f1"] = _ratio(2 * hits, predicted + support)
    weights = support / support.sum()
    return {
        "accuracy": float(hits.sum() / len(references)),
        **{f"macro_{name}": float(values.mean()) for name, values in columns.items()},
        **{f"weighted_{name}": float(values @ weights) for name, values in columns.items()},
        "per_class": {
            str(name): {**{key: float(values[i]) for key, values in columns.items()}, "support": int(support[i])}
            for i, name in enumerate(names)
        },
        "labels": [str(name) for name in names],
        "confusion": confusion.tolist(),
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
