"""Conceptual Captions: tables of captions and the addresses of their images, which are not part of the data set.

CC3M's columns are caption and url, CC12M's url and caption. https://ai.google.com/research/ConceptualCaptions
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from frozenprefix.data.images import image_ending, walk_files
from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.rows import read_table
from frozenprefix.data.sources.selection import split_in_name
from frozenprefix.errors import DataError
from frozenprefix.utils import report_left_out


class ConceptualCaptionsSource(SourceConfig):
    """A table with a row `caption<tab>url` a line; a `.csv` file has commas. Cells may be quoted, as in CSV.

    The image of a row is the file in `images` that is named by the row's number. Rows count from 0; `17.jpg`,
    `000017.png` and `00000/000000017.jpg` are all the image of row 17, which is how img2dataset writes single files
    when a shard has a power of ten of them. With a column "image" that holds paths under `images`, the numbers play no
    part. Rows without an image are left out and counted by reason, or kept for training on texts alone. The id is the
    row's number, the split is read from the file's name.

    Example:
        >>> ConceptualCaptionsSource(path="cc3m", file="Train_GCC-training.tsv").columns
        ['caption', 'url']
    """

    type: Literal["conceptual_captions"] = "conceptual_captions"
    file: str = Field(description="table under `path`, e.g. Train_GCC-training.tsv")
    images: str = Field("images", description="folder of the downloaded images under `path`")
    columns: list[str] | None = Field(
        ["caption", "url"], description="what the columns are: caption, url, image, others unread; null: see line 1"
    )

    keep_missing: bool = Field(False, description="rows without an image are samples too, of an image NUMBER.jpg")

    @field_validator("columns")
    @classmethod
    def _has_captions(cls, columns: list[str] | None) -> list[str] | None:
        if columns is not None and "caption" not in columns:
            raise ValueError("expected a column 'caption'")
        return columns

    def read(self, root: Path) -> list[Sample]:
        path = root / self.file
        rows = list(self._rows(path))
        numbered = {} if rows and "image" in rows[0][1] else _by_number(root / self.images)
        without: Counter[str] = Counter()
        samples = []
        for number, (line, row) in enumerate(rows):
            if not row["caption"].strip():
                raise DataError(f"{path}:{line}: column 'caption' is empty, expected a text")
            image = root / self.images / row["image"] if row.get("image") else numbered.get(number)
            if image is None and self.keep_missing:
                image = root / self.images / f"{number}.jpg"
            if image is None:
                without["column 'image' is empty" if "image" in row else "not downloaded"] += 1
                continue
            samples.append(
                Sample(
                    id=str(number),
                    images=(image,),
                    targets=(row["caption"].strip(),),
                    split=split_in_name(path.name),
                    metadata={"url": row["url"]} if "url" in row else {},
                    where=f"{path}:{line}",
                )
            )
        report_left_out(path, len(rows), without)
        return samples

    def _rows(self, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
        columns, delimiter = self.columns, "," if path.suffix == ".csv" else "\t"
        for line, cells in read_table(path, delimiter):
            start = "\t".join(cells)[:60]
            if columns is None:
                columns = cells
                if columns.count("caption") != 1 or len(set(columns)) < len(columns):
                    raise DataError(
                        f"{path}:{line}: got {start!r}, expected different names of columns with {delimiter!r} between "
                        "them, one of them 'caption'"
                    )
                continue
            if len(cells) != len(columns):
                got = f"{len(cells)} columns in {start!r}"
                raise DataError(f"{path}:{line}: got {got}, expected {len(columns)}: {', '.join(columns)}")
            row = dict(zip(columns, cells, strict=True))
            if "url" in row and "://" not in row["url"]:
                raise DataError(
                    f"{path}:{line}: column 'url': got {row['url'][:60]!r}, expected an address; name the columns in "
                    "`columns`, or set it to null when the first line names them"
                )
            yield line, row


def _by_number(folder: Path) -> dict[int, Path]:
    """Number in the file's name → image. Two images with the same number are an error."""
    images: dict[int, Path] = {}
    for path in sorted(walk_files(folder)) if folder.is_dir() else ():
        if image_ending(path.name) and path.stem.isdecimal():
            other = images.setdefault(int(path.stem), path)
            if other != path:
                raise DataError(f"{path}: is image {int(path.stem)}, as {other} is, expected one file for a row")
    return images
