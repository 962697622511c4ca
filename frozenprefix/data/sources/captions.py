"""A folder with `captions.jsonl`: one image or clip a line, with its captions or its label."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import StreamedSource
from frozenprefix.data.sources.rows import Row, read_rows
from frozenprefix.data.sources.selection import check_splits
from frozenprefix.data.streaming.groups import StreamedGroups
from frozenprefix.data.streaming.lines import LineGroups


class CaptionsSource(StreamedSource):
    """`{"image": "images/1.jpg", "captions": ["a dog", ...], "split": "train"}` a line; `split` and `id` are optional.

    A sample is a row. `image` may be a list: the frames of a clip, which the prompt shows one after the other. A row
    with `label` in place of `captions` is a sample of task "classification". The id is the row's `id`, else its (first)
    `image`, with the line number added when that is taken. `name` and `label` go to the sample's metadata.

    With `stream`, 29 bytes a row are in memory; rows and images are read when a step needs them.

    Example:
        >>> source = CaptionsSource(path=str(data_folder))
        >>> source.read(data_folder)[0].targets[0]
        'a red circle'
    """

    type: Literal["captions"] = "captions"
    file: str = Field("captions.jsonl", description="the file's place under `path`")

    def read(self, root: Path) -> list[Sample]:
        seen: set[str] = set()
        samples = []
        for number, row in read_rows(root / self.file):
            sample = _sample(number, row, root, row.names("image")[0] in seen)
            seen.add(sample.id)
            samples.append(sample)
        return samples

    def open(self, root: Path, finish: Callable[[Sample], Sample]) -> StreamedGroups:
        wanted = [self.split] if isinstance(self.split, str) else self.split
        splits: set[str] = set()

        def is_wanted(row: Row) -> bool:
            split = row.text_or_none("split")
            splits.update([] if split is None else [split])
            return wanted is None or split in wanted

        groups = LineGroups(
            root,
            root / self.file,
            images=lambda row: row.names("image"),
            wanted=is_wanted,
            sample=lambda number, row, taken: _sample(number, row, root, taken),
            block=self.shuffle_images,
            finish=finish,
        )
        check_splits(wanted or [], splits, self.path)
        return groups


def _sample(number: int, row: Row, root: Path, taken: bool) -> Sample:
    """The sample of a row; `taken`: an earlier one has the name of the first image as its id."""
    images = row.names("image")
    labelled = row.either("label", "captions") == "label"
    metadata: dict[str, Any] = {field: row.text(field) for field in ("name", "label") if field in row}
    return Sample(
        id=row.identifier("id") if "id" in row else (f"{images[0]}#{number}" if taken else images[0]),
        images=tuple(root / name for name in images),
        targets=(row.text("label"),) if labelled else row.texts("captions"),
        split=row.text_or_none("split"),
        task="classification" if labelled else "caption",
        metadata=metadata,
        where=row.where,
    )
