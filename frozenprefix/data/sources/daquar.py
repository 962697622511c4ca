"""DAQUAR as published: `qa.894.raw.train.txt`, questions and answers line by line, and NYU Depth's images."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.rows import read_text
from frozenprefix.data.sources.selection import files_of
from frozenprefix.errors import DataError

_IMAGE = re.compile(r"\bimage\s?(\d+)\b")
# "what is on the desk in the image3 ?": the image's name says nothing about the image
_NAMED_LAST = re.compile(r"\s+in\s+(?:the|this)\s+image\s?\d+\s*(\??)\s*$")


class DaquarSource(SourceConfig):
    """A line with a question that names its image, "what is on the desk in the image3 ?", and one with the answer.

    The words that name the image are taken off the end of the question. An answer of several things stays one text,
    with commas between them; things are written with underscores (`garbage_bin`).
    """

    type: Literal["daquar"] = "daquar"
    questions: str = Field("qa.894.raw.*.txt", description="file, or pattern of files, whose names tell the split")
    images: str = Field("nyu_depth_images", description="folder of the images")
    ending: str = Field(".png", description="ending of the images' names")
    underscores: Literal["keep", "space"] = Field("keep", description="'space' reads garbage_bin as two words")

    def read(self, root: Path) -> list[Sample]:
        files = files_of(root, self.questions, self.split)
        return [sample for file, split in files.items() for sample in self._samples(file, split, root)]

    def _samples(self, file: Path, split: str | None, root: Path) -> list[Sample]:
        lines = [line.strip() for line in read_text(file).split("\n")]
        while lines and not lines[-1]:
            lines.pop()
        if len(lines) % 2:
            raise DataError(f"{file}:{len(lines)}: got {lines[-1][:60]!r} last, expected an answer after it")
        pairs = zip(lines[::2], lines[1::2], strict=True)
        return [
            replace(self._sample(file, 2 * number + 1, question, answer, root), split=split)
            for number, (question, answer) in enumerate(pairs)
        ]

    def _sample(self, file: Path, line: int, question: str, answer: str, root: Path) -> Sample:
        named = _IMAGE.search(question)
        if named is None:
            raise DataError(f"{file}:{line}: got {question[:60]!r}, expected a question that names its image: image3")
        if not answer:
            raise DataError(f"{file}:{line + 1}: got an empty line, expected the answer to {question[:60]!r}")
        question = _NAMED_LAST.sub(r" \1", question).strip()
        if self.underscores == "space":
            question, answer = question.replace("_", " "), answer.replace("_", " ")
        return Sample(
            id=f"{file.name}:{line}",
            images=(root / self.images / f"image{named.group(1)}{self.ending}",),
            targets=(answer,),
            question=question,
            task="vqa",
            metadata={"answers": (answer,)},
        )
