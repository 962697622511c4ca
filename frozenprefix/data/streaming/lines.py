"""Samples from a file of JSON lines: in memory is where each row begins, and which rows show the same images."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.rows import Row
from frozenprefix.data.streaming.groups import LISTED, StreamedGroups
from frozenprefix.utils.jsonl import parse_line, read_lines


class LineGroups(StreamedGroups):
    """The rows of a JSON-lines file, grouped by their images: 29 bytes a row in memory.

    Groups, and rows within one, keep the order in which they are first seen. The images are files; they and the rows
    are read when a step needs them.

    Args:
        root: folder of the data.
        file: of the rows.
        images: a row → the names of its images.
        wanted: a row → whether it is read, such as by its split.
        sample: line number, row, and whether an earlier row shows the same images → the sample.
        block, finish: see `StreamedGroups`.

    Raises:
        DataError: a line is not JSON, or has no image.
    """

    def __init__(
        self,
        root: Path,
        file: Path,
        *,
        images: Callable[[Row], Sequence[str]],
        wanted: Callable[[Row], bool],
        sample: Callable[[int, Row, bool], Sample],
        block: int,
        finish: Callable[[Sample], Sample],
    ):
        self.file, self._sample = file, sample
        offsets, lengths, numbers = array("Q"), array("I"), array("I")
        keys, is_wanted = bytearray(), bytearray()  # of all rows
        digest = blake2b(digest_size=16)
        for number, offset, line in read_lines(file):
            digest.update(line)
            row = self._row(number, line)
            keys += blake2b("\n".join(images(row)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
            is_wanted.append(wanted(row))
            if is_wanted[-1]:
                offsets.append(offset)
                lengths.append(len(line))
                numbers.append(number)
        self._content = digest.hexdigest()
        self._offsets, self._lengths, self._numbers = offsets, lengths, numbers
        keys_of, mask = np.frombuffer(keys, "<u8"), np.frombuffer(is_wanted, np.bool_)
        repeated = np.ones(len(keys_of), np.bool_)
        repeated[np.unique(keys_of, return_index=True)[1]] = False
        self._repeated = repeated[mask]
        self._order, self._group_ends = group_rows(keys_of[mask])
        count = len(self._group_ends)
        sizes = [min(LISTED, count - start) for start in range(0, count, LISTED)]
        super().__init__(root, [f"{file.name}/{number}" for number in range(len(sizes))], sizes, block, finish)

    def content(self) -> str:
        return self._content

    def read(self, shard: int, row: int) -> list[Sample]:
        group = shard * LISTED + row
        first = int(self._group_ends[group - 1]) if group else 0
        samples: list[Sample] = []
        with self.file.open("rb") as file:
            for place in self._order[first : int(self._group_ends[group])].tolist():
                number = self._numbers[place]
                line = os.pread(file.fileno(), self._lengths[place], self._offsets[place])
                samples.append(self._sample(number, self._row(number, line), bool(self._repeated[place])))
        return samples

    def _row(self, number: int, line: bytes) -> Row:
        return Row(f"{self.file}:{number}", parse_line(self.file, number, line))


def group_rows(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows with equal keys, together, in the order in which their first rows come.

    Args:
        keys: [n].

    Returns:
        order: uint32[n], the rows, group by group; ends: uint32[groups], where each group ends in `order`.

    Example:
        >>> order, ends = group_rows(np.array([7, 3, 7, 5]))
        >>> order.tolist(), ends.tolist()
        ([0, 2, 1, 3], [2, 3, 4])
    """
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    group = rank[group]
    ends = np.cumsum(np.bincount(group, minlength=len(first)))
    return np.argsort(group, kind="stable").astype(np.uint32), ends.astype(np.uint32)
