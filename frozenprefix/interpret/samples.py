"""One self-contained HTML page of random images of a data set, with their texts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frozenprefix.data.samples import ImageGroup
from frozenprefix.errors import BadImageError
from frozenprefix.interpret.report import embedded_image, page_template
from frozenprefix.utils import write_text_atomic

_MOST_TEXTS = 12


def write_samples(
    path: str | Path, groups: Sequence[ImageGroup], *, title: str, images: int = 48, seed: int = 0
) -> int:
    """Write a page that needs no other file and no network. The same arguments give the same bytes.

    Args:
        path: the HTML file.
        groups: images with their samples, which may be streamed: only those on the page are read.
        images: on the page; seed: of their choice.

    Returns:
        The number of images on the page, those that cannot be read among them.

    Example:
        >>> from frozenprefix.data.samples import Sample
        >>> groups = [ImageGroup((image_path,), (Sample("1", (image_path,), ("<script>",)),))]
        >>> write_samples(tmp_path / "page.html", groups, title="drawings")
        1
        >>> "<script>" in (tmp_path / "page.html").read_text()
        False
    """
    chosen = sorted(random.Random(seed).sample(range(len(groups)), min(images, len(groups))))
    cards = [_card(groups, number) for number in chosen]
    page = page_template("samples.html").render(title=title, cards=cards, total=len(groups), seed=seed)
    write_text_atomic(path, page)
    return len(cards)


def _card(groups: Sequence[ImageGroup], number: int) -> dict[str, Any]:
    try:
        group = groups[number]
    except BadImageError as error:
        return {"number": number, "title": error.reason, "images": [{"problem": str(error)}], "entries": []}
    first = next((text for sample in group.samples for text in sample.targets), "")
    boxes = [text for sample in group.samples[:_MOST_TEXTS] for text in sample.targets[:1]]
    return {
        "number": number,
        "title": group.samples[0].id,
        "images": [_image(image, first, boxes) for image in group.images],
        "entries": [(s.task, s.question, s.targets[:_MOST_TEXTS]) for s in group.samples[:_MOST_TEXTS]],
    }


def _image(path: Path, text: str, boxes: Sequence[str]) -> dict[str, Any]:
    if path.suffix == ".npy":
        return {"problem": "features in place of an image"}
    return embedded_image(path, text, boxes=boxes)
