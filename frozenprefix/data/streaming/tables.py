"""Samples from parquet and arrow files: a shard is a row group, or so many rows of an arrow file.

Arrow files are mapped into memory, where any row is found by itself. A row group of a parquet file is decoded as a
whole; those of a block are kept until the next block, so that memory grows with `shuffle_images`, not with the data.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.hf_tables import Table
from frozenprefix.data.streaming.groups import StreamedGroups
from frozenprefix.errors import DataError
from frozenprefix.utils import content_hash
from frozenprefix.utils.damage import refusing_damage

ROWS = 1000  # rows of an arrow file that count as a shard
_EDGE = 1 << 16  # bytes at both ends of a file that tell its content
Values = dict[str, Any]


class ShardedTable(ABC):
    """A table whose rows are read from shards.

    Attributes:
        table: its name, its split and its files.
        columns: that are read.
        features: types of all columns.
        sizes: rows of each shard.
    """

    features: datasets.Features
    sizes: list[int]

    def __init__(self, table: Table, columns: Sequence[str]):
        self.table, self.columns = table, list(columns)

    @abstractmethod
    def row(self, shard: int, row: int) -> Values:
        """One row."""

    def content(self) -> str:
        """A text that changes with the content: sizes of the files, and hashes of their first and last bytes."""
        return content_hash(*map(_edges, self.table.files))


class ParquetShards(ShardedTable):
    """The row groups of a parquet file.

    Args:
        kept: row groups of all tables that stay decoded.
    """

    def __init__(self, table: Table, columns: Sequence[str], kept: RowGroups):
        super().__init__(table, columns)
        file = table.files[0]
        with refusing_damage(DataError, f"{file}: cannot be read as a table ({{reason}}); fetch it again"):
            metadata = pyarrow.parquet.read_metadata(file)
            self.features = datasets.Features.from_arrow_schema(metadata.schema.to_arrow_schema())
        self.sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self._kept = kept

    def row(self, shard: int, row: int) -> Values:
        return self._kept.read(self.table.files[0], shard, self.columns).slice(row, 1).to_pylist()[0]


class RowGroups:
    """Decoded row groups of parquet files: those of a block of images, the least recently read one goes first.

    Args:
        most_rows: rows of the groups that are kept, which may be one group more.
    """

    def __init__(self, most_rows: int):
        self.most_rows = most_rows
        self._kept: OrderedDict[tuple[Path, int], pyarrow.Table] = OrderedDict()

    def read(self, file: Path, shard: int, columns: Sequence[str]) -> pyarrow.Table:
        group = self._kept.get((file, shard))
        if group is None:
            with pyarrow.parquet.ParquetFile(file) as reader:
                group = reader.read_row_group(shard, columns=list(columns), use_threads=False)
            while self._kept and sum(table.num_rows for table in self._kept.values()) >= self.most_rows:
                self._kept.popitem(last=False)
            self._kept[file, shard] = group
        self._kept.move_to_end((file, shard))
        return group

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}


class ArrowShards(ShardedTable):
    """The rows of a data set that `datasets` maps into memory, a thousand at a time."""

    def __init__(self, table: Table, columns: Sequence[str]):
        super().__init__(table, columns)
        rows = table.load(self.columns)
        self.features, self._rows = rows.features, rows.with_format("arrow")
        self.sizes = [min(ROWS, len(rows) - start) for start in range(0, len(rows), ROWS)]

    def row(self, shard: int, row: int) -> Values:
        place = shard * ROWS + row
        one = self._rows[place : place + 1]
        one.validate(full=True)  # offsets of a damaged file would point anywhere in memory
        return one.to_pylist()[0]


def sharded(table: Table, columns: Sequence[str], kept: RowGroups) -> ShardedTable:
    """The shards of a table."""
    parquet = [file for file in table.files if file.suffix == ".parquet"]
    return ParquetShards(table, columns, kept) if parquet else ArrowShards(table, columns)


def _edges(file: Path) -> str:
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        first = stream.read(_EDGE)
        stream.seek(max(0, size - _EDGE))
        return content_hash(str(size), first, stream.read(_EDGE))


@dataclass(frozen=True)
class TablePart:
    """One shard of all tables: its table, its number there, and the number of its first row in the table."""

    table: ShardedTable
    shard: int
    first: int


class TableGroups(StreamedGroups):
    """The samples of tables, a row each.

    Args:
        root: folder of the tables.
        tables: in a fixed order.
        sample: a row's values, its table and its number → the sample.
        block, finish: see `StreamedGroups`.
    """

    def __init__(
        self,
        root: Path,
        tables: Sequence[ShardedTable],
        sample: Callable[[Values, ShardedTable, int], Sample],
        block: int,
        finish: Callable[[Sample], Sample],
    ):
        self._parts: list[TablePart] = []
        for table in tables:
            first = 0
            for shard, size in enumerate(table.sizes):
                self._parts.append(TablePart(table, shard, first))
                first += size
        names = [f"{part.table.table.name}/{part.shard}" for part in self._parts]
        sizes = [part.table.sizes[part.shard] for part in self._parts]
        super().__init__(root, names, sizes, block, finish)
        self._tables, self._sample = list(tables), sample

    def content(self) -> str:
        return content_hash(*(table.content() for table in self._tables))

    def read(self, shard: int, row: int) -> list[Sample]:
        part = self._parts[shard]
        where = f"{self.names[shard]}: row {row}"
        with refusing_damage(DataError, f"{where} cannot be read ({{reason}}); fetch the file again"):
            values = part.table.row(part.shard, row)
        return [self._sample(values, part.table, part.first + row)]
