"""Data sets of Hugging Face's library `datasets`: a folder of `save_to_disk`, or parquet or arrow files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import StreamedSource
from frozenprefix.data.sources.columns import ROLES, columns_fit, find_columns, sample_of_row
from frozenprefix.data.sources.hf_tables import Table, image_value, tables_of, take_images
from frozenprefix.data.sources.image_files import unpack_once
from frozenprefix.data.sources.rows import Row
from frozenprefix.data.sources.selection import of_wanted
from frozenprefix.data.streaming.groups import StreamedGroups
from frozenprefix.errors import BadImageError, DataError
from frozenprefix.utils import report_left_out
from frozenprefix.utils.damage import refusing_damage
from frozenprefix.utils.images import StoredImage


class HfDatasetSource(StreamedSource):
    """Rows with a column of images, and columns with captions, a question and its answers, or a label.

    Columns hold texts or lists of texts; a label may be a number that the data set has a name for. When no column is
    named, the first of these that exists is taken: question and answers (or answer), captions, caption, text, label.

    Images are unpacked into the user's cache when they are read for the first time, which needs their size once more.
    Rows without an image are left out and counted. Splits have the data set's own names; the split of a parquet file
    is the part of its name before -00000-of-00001. The id is SPLIT/ROW, or FILE/ROW.

    With `stream`, nothing is unpacked: a row is read when a step needs it.

    Example:
        >>> HfDatasetSource(path="vqa", question="question", answers="answers").image
        'image'
    """

    type: Literal["hf_dataset"] = "hf_dataset"
    files: str | None = Field(None, description="parquet or arrow file(s) under `path`, e.g. data/train-*.parquet")
    image: str = Field("image", description="column of the images: of type Image, or their files' bytes")
    captions: str | None = Field(None, description="column of the caption(s)")
    question: str | None = Field(None, description="column of the question; needs `answers`")
    answers: str | None = Field(None, description="column of the answer(s); the commonest one is the target")
    label: str | None = Field(None, description="column of the label, for task 'classification'")

    @model_validator(mode="after")
    def _columns_fit(self) -> HfDatasetSource:
        if not columns_fit(self.captions, self.question, self.answers, self.label):
            raise ValueError("expected `captions`, or `question` and `answers`, or `label`")
        return self

    def read(self, root: Path) -> list[Sample]:
        samples: list[Sample] = []
        without: Counter[str] = Counter()
        tables = tables_of(root, self.files)
        for number in of_wanted({n: table.split for n, table in enumerate(tables)}, self.split, where=str(root)):
            damaged = f"{tables[number].files[0]}: cannot be read as a table ({{reason}}); fetch it again"
            with refusing_damage(DataError, damaged):
                samples += self._samples(tables[number], root, without)
        report_left_out(root, len(samples) + sum(without.values()), without)
        return samples

    def open(self, root: Path, finish: Callable[[Sample], Sample]) -> StreamedGroups:
        from frozenprefix.data.streaming.tables import RowGroups, ShardedTable, TableGroups, sharded

        tables, kept = tables_of(root, self.files, check=False), RowGroups(self.shuffle_images)
        wanted = of_wanted({n: table.split for n, table in enumerate(tables)}, self.split, where=str(root))
        columns = {tables[number].name: self._columns(tables[number]) for number in wanted}

        def sample(values: dict[str, Any], shards: ShardedTable, number: int) -> Sample:
            table = shards.table
            where, roles = f"{table.files[0]}: row {number}", columns[table.name]
            data, path = image_value(values.pop(self.image), f"{where}: column '{self.image}'")
            if not data and path is None:
                raise BadImageError("no image in the row", f"{where}: column '{self.image}': got no image")
            image = StoredImage.of(f"{table.files[0]}/{number}", data) if data else root / str(path)
            names = getattr(shards.features[roles["label"]], "names", None) if "label" in roles else None
            if names is not None:
                values[roles["label"]] = _named(values[roles["label"]], names)
            return sample_of_row(Row(where, values), roles, f"{table.name}/{number}", (image,), table.split)

        shards = [sharded(tables[n], [self.image, *columns[tables[n].name].values()], kept) for n in wanted]
        return TableGroups(root, shards, sample, self.shuffle_images, finish)

    def _samples(self, table: Table, root: Path, without: Counter[str]) -> Iterator[Sample]:
        columns = self._columns(table)
        what = f"{table.name} {self.image}"
        folder, entries = unpack_once(table.files, partial(take_images, table, self.image), what=what)
        rows = table.load(list(columns.values()))
        names = getattr(rows.features[columns["label"]], "names", None) if "label" in columns else None
        for number, (values, entry) in enumerate(zip(rows, entries, strict=True)):
            if entry["file"] is None and entry["path"] is None:
                without["no image in the row"] += 1
                continue
            image = folder / entry["file"] if entry["file"] else root / entry["path"]
            if names is not None:
                values[columns["label"]] = _named(values[columns["label"]], names)
            row = Row(str(table.files[0]), values, f"row {number}")
            yield sample_of_row(row, columns, f"{table.name}/{number}", (image,), table.split)

    def _columns(self, table: Table) -> dict[str, str]:
        """Role of a column → its name."""
        named = {role: getattr(self, role) for role in ROLES}
        return find_columns(table.columns, self.image, named, str(table.files[0]))


def _named(label: int | None, names: list[str]) -> str | None:
    """The name of a label; -1 marks a label that is not public."""
    return None if label is None or label < 0 else names[label]
