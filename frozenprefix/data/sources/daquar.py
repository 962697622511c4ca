"""DAQUAR as published: `qa.894.raw.train.txt`, questions and answers line by line, and NYU Depth's images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.selection import files_of
from frozenprefix.errors import DataError
from frozenprefix.utils import read_text

_IMAGE = re.compile(r"\bimage\s?(\d+)\b")
# "what is on the desk in the image3 ?": the image's name says nothing about the image
_NAMED_LAST = re.compile(r"\s+in\s+(?:the|this)\s+image\s?\d+\s*(\??)\s*$")


class DaquarSource(SourceConfig):
    """A line with a question that names its image, "what is on the desk in the image3 ?", and one with the answer.

    The words that name the image are taken off the end of the question. An answer of several things stays one text,
    with commas between them; things are written with underscores (`garbage_bin`).

    Example:
        >>> DaquarSource(path="daquar").ending
        '.png'
    """

    type: Literal["daquar"] = "daquar"
    questions: str = Field("qa.894.raw.*.txt", description="file, or pattern of files, whose names tell the split")
    images: str = Field("nyu_depth_images", description="folder of the images")
    ending: str = Field(".png", description="ending of the images' names")
    underscores: Literal["keep", "space"] = Field("keep", description="'space' reads garbage_bin as two words")

    def read(self, root: Path) -> list[Sample]:
        samples = []
        for file, split in files_of(root, self.questions, self.split).items():
            lines = [line.strip() for line in read_text(file).rstrip().split("\n")]
            if len(lines) % 2:
                if lines == [""]:
                    continue
                raise DataError(f"{file}:{len(lines)}: got {lines[-1][:60]!r} last, expected an answer after it")
            for number in range(0, len(lines), 2):
                question, answer = lines[number : number + 2]
                if not answer:
                    raise DataError(f"{file}:{number + 2}: got an empty line, expected the answer to {question[:60]!r}")
                samples.append(self._sample(f"{file}:{number + 1}", question, answer, split, root))
        return samples

    def _sample(self, place: str, question: str, answer: str, split: str | None, root: Path) -> Sample:
        named = _IMAGE.search(question)
        if named is None:
            raise DataError(f"{place}: got {question[:60]!r}, expected a question that names its image: image3")
        question = _NAMED_LAST.sub(r" \1", question).strip()
        if self.underscores == "space":
            question, answer = question.replace("_", " "), answer.replace("_", " ")
        return Sample(
            id=Path(place).name,
            images=(root / self.images / f"image{named.group(1)}{self.ending}",),
            targets=(answer,),
            question=question,
            split=split,
            task="vqa",
            metadata={"answers": (answer,)},
            where=place,
        )
