"""Rows of tables whose columns hold an image, and captions, a question and its answers, or a label."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.qa import commonest
from frozenprefix.data.sources.rows import Row
from frozenprefix.errors import DataError, did_you_mean

ROLES = ("captions", "question", "answers", "label")
# roles of columns, tried in this order when no column is named
_USUAL = (
    {"question": "question", "answers": "answers"},
    {"question": "question", "answers": "answer"},
    {"captions": "captions"},
    {"captions": "caption"},
    {"captions": "text"},
    {"label": "label"},
)


def find_columns(there: Collection[str], image: str, named: Mapping[str, str | None], where: str) -> dict[str, str]:
    """Role of a column → its name, for the columns `there`.

    Args:
        image: column of the images.
        named: role → the column that the user names, or None. When none is named, the usual names are tried.
        where: the table, for messages.

    Raises:
        DataError: a column is not there.

    Example:
        >>> find_columns(["image", "caption"], "image", {}, "table")
        {'captions': 'caption'}
    """
    columns = {role: name for role, name in named.items() if name is not None}
    if not columns:
        columns = dict(next((usual for usual in _USUAL if set(usual.values()) <= set(there)), {}))
    listed = ", ".join(there)
    if not columns:
        raise DataError(f"{where}: got columns {listed}; name those to read, e.g. `captions`")
    for role, name in {"image": image, **columns}.items():
        if name not in there:
            near = did_you_mean(name, there)
            raise DataError(f"{where}: `{role}`: no column '{name}'{near}; columns: {listed}")
    return columns


def columns_fit(captions: str | None, question: str | None, answers: str | None, label: str | None) -> bool:
    """Whether the named columns make one kind of sample.

    Example:
        >>> columns_fit("text", None, None, None), columns_fit(None, "question", None, None)
        (True, False)
    """
    named = [captions is not None, question is not None, label is not None]
    return sum(named) <= 1 and (question is None) == (answers is None)


def sample_of_row(
    row: Row, columns: Mapping[str, str], name: str, images: tuple[Path, ...], split: str | None
) -> Sample:
    """The sample of a row; `columns` are those of `find_columns`.

    Example:
        >>> sample_of_row(Row("table", {"text": "a dog "}), {"captions": "text"}, "0", (image_path,), None).targets
        ('a dog',)
    """
    if "captions" in columns:
        texts = tuple(text.strip() for text in row.texts(columns["captions"]))
        return Sample(name, images, texts, split=split, where=row.where)
    if "label" in columns:
        labels = (row.text(columns["label"]),) if columns["label"] in row else ()
        metadata = {"label": labels[0]} if labels else {}
        return Sample(name, images, labels, split=split, task="classification", metadata=metadata, where=row.where)
    answers = row.texts(columns["answers"])
    return Sample(
        id=name,
        images=images,
        targets=commonest(answers),
        question=row.text(columns["question"]),
        split=split,
        task="vqa",
        metadata={"answers": answers},
        where=row.where,
    )
