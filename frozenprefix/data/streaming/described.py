"""Samples as JSON: what `frozenprefix data build` writes beside an image, and reads back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.rows import Row
from frozenprefix.errors import DataError

BUILT = "shards.json"  # beside the tars that `data build` wrote


def describe(sample: Sample) -> dict[str, Any]:
    """A sample without its images, as JSON values.

    Example:
        >>> describe(Sample("1", (), ("a dog",), split="train"))
        {'id': '1', 'task': 'caption', 'targets': ['a dog'], 'split': 'train'}
    """
    fields: dict[str, Any] = {"id": sample.id, "task": sample.task, "targets": list(sample.targets)}
    fields |= {name: getattr(sample, name) for name in ("prompt", "question", "split")}
    fields["history"] = None if sample.history is None else [list(turn) for turn in sample.history]
    fields["answers"] = list(sample.metadata["answers"]) if "answers" in sample.metadata else None
    return {name: value for name, value in fields.items() if value is not None}


def sample_of(row: Row, images: tuple[Path, ...]) -> Sample:
    """The sample that `describe` described.

    Raises:
        DataError: a field is missing or of another type.

    Example:
        >>> sample_of(Row("a.tar", describe(Sample("1", (), ("a dog",)))), ()).targets
        ('a dog',)
    """
    history = None
    if "history" in row:
        turns = row.values("history")
        if not all(isinstance(turn, list) and list(map(type, turn)) == [str, str] for turn in turns):
            raise DataError(f"{row.where}: field 'history': expected a list of pairs of texts")
        history = tuple((turn[0], turn[1]) for turn in turns)
    return Sample(
        id=row.text("id"),
        images=images,
        targets=row.texts("targets"),
        prompt=row.text_or_none("prompt"),
        question=row.text_or_none("question"),
        history=history,
        split=row.text_or_none("split"),
        task=row.text("task"),
        metadata={"answers": row.texts("answers")} if "answers" in row else {},
        where=row.where,
    )
