"""Flickr8k.token.txt and Flickr30k's results_20130124.token: a caption a line, with split lists beside them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from pydantic import Field

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.rows import read_text
from frozenprefix.errors import DataError

log = logging.getLogger(__name__)


class FlickrTokensSource(SourceConfig):
    """Lines of `IMAGE.jpg#NUMBER<tab>caption`; one sample an image, with all its captions.

    With `split_files`, images that are in none of the lists are left out, and their number is logged.
    """

    type: Literal["flickr_tokens"] = "flickr_tokens"
    tokens: str = Field("Flickr8k.token.txt", description="the caption file under `path`")
    images: str = Field(description="folder of the images under `path`")
    split_files: dict[str, str] = Field(default_factory=dict, description="split → list of its images, under `path`")

    def read(self, root: Path) -> list[Sample]:
        captions = _captions(root / self.tokens)
        splits = _splits({split: root / file for split, file in self.split_files.items()})
        left_out = sum(name not in splits for name in captions) if splits else 0
        if left_out:
            log.info("%s: %d images are in none of the split files and are left out", self.tokens, left_out)
        return [
            Sample(id=name, images=(root / self.images / name,), targets=tuple(texts), split=splits.get(name))
            for name, texts in captions.items()
            if not splits or name in splits
        ]


def _captions(path: Path) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        key, tab, caption = line.partition("\t")
        name, mark, index = key.rpartition("#")
        if not (tab and mark and name and index.isdigit()):
            raise DataError(f"{path}:{number}: got {line[:60]!r}, expected IMAGE.jpg#NUMBER, a tab and a caption")
        captions.setdefault(name, []).append(caption.strip())
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
