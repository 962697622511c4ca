"""The check that predictions and references have the same ids."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from frozenprefix.errors import DataError


def check_same_ids(predictions: Collection[str], references: Collection[str], what: str) -> None:
    """Raise `DataError` naming a few ids where the two differ, or when both are empty. `what`: "references"."""
    missing = [key for key in references if key not in predictions]
    unexpected = [key for key in predictions if key not in references]
    if missing or unexpected:
        raise DataError(
            f"predictions and {what} must have the same ids: {len(missing)} of {len(references)} have no prediction"
            f"{_a_few(missing)}, {len(unexpected)} predictions have none of the {what}{_a_few(unexpected)}; "
            f"predict every item once, or score against the {what} of the predicted ones only"
        )
    if not predictions:
        raise DataError(f"predictions and {what} are empty; expected at least one item to score")


def _a_few(ids: Iterable[str]) -> str:
    few = [repr(key) for key in ids]
    return f" ({', '.join(few[:3])}{', ...' if len(few) > 3 else ''})" if few else ""
