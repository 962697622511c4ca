"""Flickr8k and Flickr30k: a caption a line, with split lists beside them.

Read are `Flickr8k.token.txt` and Flickr30k's `results_20130124.token`, Kaggle's `captions.txt` (`image,caption`), and
Flickr30k's `results.csv` (`image_name| comment_number| comment`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.rows import read_table
from frozenprefix.errors import DataError
from frozenprefix.utils import read_text, report_left_out


class FlickrTokensSource(SourceConfig):
    """Lines of `IMAGE.jpg#NUMBER<tab>caption`, or a table of images and captions; one sample an image.

    With `split_files`, images that are in none of the lists are left out, and their number is logged.

    Example:
        >>> FlickrTokensSource(path="flickr8k", images="Images", tokens="captions.txt").tokens
        'captions.txt'
    """

    type: Literal["flickr_tokens"] = "flickr_tokens"
    tokens: str = Field("Flickr8k.token.txt", description="the caption file under `path`")
    images: str = Field(description="folder of the images under `path`")
    split_files: dict[str, str] = Field(default_factory=dict, description="split → list of its images, under `path`")

    def read(self, root: Path) -> list[Sample]:
        captions = _captions(root / self.tokens)
        splits = _splits({split: root / file for split, file in self.split_files.items()})
        left_out = sum(name not in splits for name in captions) if splits else 0
        report_left_out(root / self.tokens, len(captions), {"in none of the split files": left_out}, what="images")
        return [
            Sample(
                id=name,
                images=(root / self.images / name,),
                targets=tuple(texts),
                split=splits.get(name),
                where=str(root / self.tokens),
            )
            for name, texts in captions.items()
            if not splits or name in splits
        ]


def _captions(path: Path) -> dict[str, list[str]]:
    """Image → its captions, in the order of the file."""
    head = read_text(path).split("\n", 1)[0].strip().lower()
    if re.fullmatch(r"image\s*,\s*caption", head):
        return _table(path, ",")
    if re.fullmatch(r"image_name\s*\|\s*comment_number\s*\|\s*comment", head):
        return _table(path, "|")
    return _tokens(path)


def _tokens(path: Path) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        key, tab, caption = line.partition("\t")
        name, mark, index = key.rpartition("#")
        if not (tab and mark and name and index.isdigit()):
            raise DataError(
                f"{path}:{number}: got {line[:60]!r}, expected IMAGE.jpg#NUMBER, a tab and a caption; or a first line "
                "'image,caption' or 'image_name| comment_number| comment'"
            )
        if lines.setdefault(key, number) != number:
            raise DataError(f"{path}:{number}: got {key}, which line {lines[key]} has too; expected another number")
        captions.setdefault(name, []).append(caption.strip())
    return captions


def _table(path: Path, delimiter: str) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    columns = 2 if delimiter == "," else 3
    for number, cells in list(read_table(path, delimiter))[1:]:
        if len(cells) == 2 and columns == 3:
            # one line of Flickr30k's file lacks its second delimiter: "2199200615.jpg| 4   A dog runs ..."
            cells = [cells[0], *cells[1].strip().split(maxsplit=1)]
        if len(cells) != columns or not cells[0].strip():
            got = f"{len(cells)} cells in {delimiter.join(cells)[:60]!r}"
            raise DataError(f"{path}:{number}: got {got}, expected {columns}; put texts with '{delimiter}' in quotes")
        captions.setdefault(cells[0].strip(), []).append(cells[-1].strip())
    return captions


def _splits(files: dict[str, Path]) -> dict[str, str]:
    splits: dict[str, str] = {}
    for split, path in files.items():
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            name = line.strip()
            if splits.get(name, split) != split:
                raise DataError(f"{path}:{number}: image {name} is in split '{splits[name]}' too, expected one split")
            if name:
                splits[name] = split
    return splits
