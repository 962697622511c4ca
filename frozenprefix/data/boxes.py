"""Boxes as text, so that a language model can read and write them.

A box is written as four whole numbers, percent of the image's width and height: left, top, right, bottom. `12 30 55 80`
begins at 12 % of the width. The numbers say how large a box is without knowing the image, every tokenizer has them, and
a frozen language model has read many. Boxes as others write them are read too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from frozenprefix.errors import DataError

#: Left, top, right, bottom, each 0 to 1 of the image's width or height.
Box = tuple[float, float, float, float]

_NUMBER = r"(\d+(?:\.\d+)?)"
_PLAIN = re.compile(rf"(?<![\d.]){_NUMBER}[\s,]+{_NUMBER}[\s,]+{_NUMBER}[\s,]+{_NUMBER}(?![\d])")
_PALIGEMMA = re.compile(r"<loc(\d{4})>" * 4)
_KOSMOS = re.compile(r"<patch_index_(\d{4})><patch_index_(\d{4})>")
_KOSMOS_SIDE = 32


def format_box(box: Box, step: int = 1) -> str:
    """Write a box, in percent.

    Args:
        step: round to multiples of it, percent; coarse numbers are learned faster.

    Raises:
        DataError: for a box that is not left to right and top to bottom within the image.

    Example:
        >>> format_box((0.123, 0.3, 0.551, 0.8)), format_box((0.123, 0.3, 0.551, 0.8), step=5)
        ('12 30 55 80', '10 30 55 80')
    """
    left, top, right, bottom = box
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise DataError(f"box: got {box}, expected 0 ≤ left < right ≤ 1 and 0 ≤ top < bottom ≤ 1")
    first, last = (_rounded(box[axis], box[axis + 2], step) for axis in (0, 1))
    return f"{first[0]} {last[0]} {first[1]} {last[1]}"


def _rounded(low: float, high: float, step: int) -> tuple[int, int]:
    """Two edges in percent, rounded to multiples of the step, which stay apart."""
    first, last = (min(100 // step, round(value * 100 / step)) for value in (low, high))
    if first == last:
        first, last = (first, first + 1) if (first + 1) * step <= 100 else (first - 1, first)
    return first * step, last * step


def boxes_in(text: str) -> list[Box]:
    """The boxes in a text, as `format_box`, PaliGemma (`<loc0123>` four times) or Kosmos-2 (patch indices) write them.

    Four numbers up to 1 of which one has a point are shares, and others up to 100 are percent. What is no box in the
    image, such as one whose right is left of its left, is left out.

    Example:
        >>> boxes_in("The dog is at 12 30 55 80.")
        [(0.12, 0.3, 0.55, 0.8)]
        >>> boxes_in("<loc0256><loc0000><loc0768><loc0512> dog")  # top, left, bottom, right of 1024
        [(0.0, 0.25, 0.5, 0.75)]
        >>> boxes_in("60 10 20 30")
        []
    """
    return [box for box in _written(text) if 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1]


def _written(text: str) -> Iterator[Box]:
    for match in _PALIGEMMA.finditer(text):
        top, left, bottom, right = (int(number) / 1024 for number in match.groups())
        yield left, top, right, bottom
    for match in _KOSMOS.finditer(text):
        first, last = (divmod(int(number), _KOSMOS_SIDE) for number in match.groups())
        left, top, right, bottom = first[1], first[0], last[1] + 1, last[0] + 1
        yield left / _KOSMOS_SIDE, top / _KOSMOS_SIDE, right / _KOSMOS_SIDE, bottom / _KOSMOS_SIDE
    for match in _PLAIN.finditer(text):
        numbers = [float(number) for number in match.groups()]
        scale = 1 if max(numbers) <= 1 and any("." in number for number in match.groups()) else 100
        a, b, c, d = (number / scale for number in numbers)
        yield a, b, c, d


def is_box(text: str) -> bool:
    """Whether a text is one box and nothing else.

    Example:
        >>> is_box("12 30 55 80"), is_box("12 dogs")
        (True, False)
    """
    return bool(_PLAIN.fullmatch(text.strip().strip("[]().")) or _PALIGEMMA.fullmatch(text.strip())) and bool(
        boxes_in(text)
    )


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes, 0 to 1.

    Example:
        >>> overlap((0.0, 0.0, 0.5, 0.5), (0.25, 0.0, 0.75, 0.5))
        0.3333333333333333
    """
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return width * height / (areas - width * height)
