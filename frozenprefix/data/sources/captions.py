"""A folder with `captions.jsonl`: one image (or clip) a line, with its captions and its split."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.rows import Row, read_jsonl


class CaptionsSource(SourceConfig):
    """`{"image": "images/1.jpg", "captions": ["a dog", ...], "split": "train"}` a line; `split` and `id` are optional.

    A sample is a row. `image` may be a list: the frames of a clip, which the prompt shows one after the other. The id
    is the row's `id`, else its (first) `image`, with the line number added if that is taken.
    """

    type: Literal["captions"] = "captions"
    file: str = Field("captions.jsonl", description="the file's place under `path`")

    def read(self, root: Path) -> list[Sample]:
        seen: set[str] = set()
        samples = []
        for number, row in read_jsonl(root / self.file):
            sample = _sample(number, row, root, seen)
            seen.add(sample.id)
            samples.append(sample)
        return samples


def _sample(number: int, row: Row, root: Path, seen: set[str]) -> Sample:
    images = row.names("image")
    image = images[0]
    return Sample(
        id=row.identifier("id") if "id" in row else (f"{image}#{number}" if image in seen else image),
        images=tuple(root / name for name in images),
        targets=row.texts("captions"),
        split=row.text_or_none("split"),
    )
