"""A folder with `captions.jsonl`: one image or clip a line, with its captions or its label."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.rows import Row, read_rows


class CaptionsSource(SourceConfig):
    """`{"image": "images/1.jpg", "captions": ["a dog", ...], "split": "train"}` a line; `split` and `id` are optional.

    A sample is a row. `image` may be a list: the frames of a clip, which the prompt shows one after the other. A row
    with `label` in place of `captions` is a sample of task "classification". The id is the row's `id`, else its (first)
    `image`, with the line number added when that is taken. `name` and `label` go to the sample's metadata.

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
            sample = _sample(number, row, root, seen)
            seen.add(sample.id)
            samples.append(sample)
        return samples


def _sample(number: int, row: Row, root: Path, seen: set[str]) -> Sample:
    images = row.names("image")
    labelled = row.either("label", "captions") == "label"
    metadata: dict[str, Any] = {field: row.text(field) for field in ("name", "label") if field in row}
    return Sample(
        id=row.identifier("id") if "id" in row else (f"{images[0]}#{number}" if images[0] in seen else images[0]),
        images=tuple(root / name for name in images),
        targets=(row.text("label"),) if labelled else row.texts("captions"),
        split=row.text_or_none("split"),
        task="classification" if labelled else "caption",
        metadata=metadata,
        where=row.where,
    )
