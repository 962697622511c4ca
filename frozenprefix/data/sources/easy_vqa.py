"""easy-VQA: drawings of one coloured shape and questions about it, from the wheel of that name (MIT licence).

`path: pypi://easy-vqa==1.0/easy_vqa/data` fetches it.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.rows import read_json
from frozenprefix.data.sources.selection import in_validation
from frozenprefix.errors import DataError
from frozenprefix.utils import report

COLORS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
SHAPES = frozenset({"circle", "rectangle", "triangle"})
_NEGATIONS = frozenset({"no", "not"})

_Question = tuple[str, str]


class EasyVqaSource(SourceConfig):
    """`train/questions.json` and `test/questions.json`: lists of `[question, answer, image number]`.

    A `val` split is taken out of `train` by image. `metadata["question_type"]` is shape, color or yes-no. With
    `captions`, an image whose questions and answers tell its colour and its shape adds a caption sample, "a blue
    rectangle", before its questions; with `classes`, a sample of task "classification" with that label. The number of
    images whose questions do not tell both is logged.

    Example:
        >>> EasyVqaSource(path="pypi://easy-vqa==1.0/easy_vqa/data", captions=True).val_fraction
        0.1
    """

    type: Literal["easy_vqa"] = "easy_vqa"
    questions: bool = Field(True, description="return the question samples")
    captions: bool = Field(False, description="return one caption sample an image")
    classes: Literal["shape", "color", "color shape"] | None = Field(
        None, description="return one classification sample an image, with this as its label"
    )
    val_fraction: float = Field(0.1, ge=0, lt=1, description="share of the training images in split 'val'")
    val_seed: int = 0

    def read(self, root: Path) -> list[Sample]:
        return [*self._read_folder(root / "train", "train"), *self._read_folder(root / "test", "test")]

    def _read_folder(self, root: Path, folder: str) -> list[Sample]:
        samples: list[Sample] = []
        without = 0
        by_image = _by_image(root / "questions.json")
        for number, questions in by_image.items():
            held_out = folder == "train" and in_validation(str(number), self.val_fraction, self.val_seed)
            split = "val" if held_out else folder
            name, image = f"{folder}/{number}", root / "images" / f"{number}.png"
            if self.captions or self.classes:
                caption = derive_caption(questions, where=f"{root / 'questions.json'}: image {image}")
                without += caption is None
                if caption is not None:
                    samples += self._whole_image_samples(caption, name, image, split)
            if self.questions:
                samples.extend(_question_samples(questions, name, image, split))
        reasons = {"no caption, as its questions do not tell both words": without}
        report(f"easy_vqa {folder}", len(by_image), reasons, what="images", level=logging.INFO)
        return samples

    def _whole_image_samples(self, caption: str, name: str, image: Path, split: str) -> list[Sample]:
        samples = []
        if self.captions:
            samples.append(Sample(id=f"{name}#caption", images=(image,), targets=(caption,), split=split))
        if self.classes is not None:
            _, color, shape = caption.split()
            label = {"color": color, "shape": shape, "color shape": f"{color} {shape}"}[self.classes]
            samples.append(
                Sample(id=f"{name}#class", images=(image,), targets=(label,), split=split, task="classification")
            )
        return samples


def derive_caption(questions: list[_Question], *, where: str) -> str | None:
    """Compose "a COLOR SHAPE" from an image's questions and answers; None when they do not tell both.

    Example:
        >>> derive_caption([("is there a red shape?", "yes"), ("what is it?", "circle")], where="q.json")
        'a red circle'
    """
    there: set[str] = set()
    for question, answer in questions:
        words = re.findall(r"[a-z]+", question.lower())
        named = (COLORS | SHAPES).intersection(words)
        if answer in ("yes", "no"):
            if (answer == "yes") != bool(_NEGATIONS.intersection(words)):
                there |= named
        else:
            there |= named | {answer}
    colors, shapes = sorted(there & COLORS), sorted(there & SHAPES)
    if len(colors) > 1 or len(shapes) > 1:
        raise DataError(
            f"{where}: its answers contradict each other: got {', '.join(colors + shapes)}, expected one each"
        )
    return f"a {colors[0]} {shapes[0]}" if colors and shapes else None


def question_type(answer: str) -> str:
    """ "color", "shape" or "yes-no".

    Example:
        >>> question_type("teal")
        'color'
    """
    if answer in COLORS:
        return "color"
    return "shape" if answer in SHAPES else "yes-no"


def _question_samples(questions: list[_Question], name: str, image: Path, split: str) -> list[Sample]:
    return [
        Sample(
            id=f"{name}#{number}",
            images=(image,),
            targets=(answer,),
            question=question,
            split=split,
            task="vqa",
            metadata={"answers": (answer,), "question_type": question_type(answer)},
        )
        for number, (question, answer) in enumerate(questions)
    ]


def _by_image(path: Path) -> dict[int, list[_Question]]:
    rows = read_json(path)
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: got a JSON {type(rows).__name__}, expected a list of [question, answer, image number]"
        )
    images: dict[int, list[_Question]] = {}
    known = COLORS | SHAPES | {"yes", "no"}
    for number, row in enumerate(rows):
        match row:
            case [str(question), str(answer), int(image)] if answer in known:
                images.setdefault(image, []).append((question, answer))
            case _:
                raise DataError(
                    f"{path}: [{number}]: got {row!r}, expected [question, answer, image number] "
                    f"with an answer out of {', '.join(sorted(known))}"
                )
    return images
