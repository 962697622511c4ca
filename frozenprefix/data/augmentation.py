"""Augmentation of training images by a few fixed views: crops and mirror images, whose features can be cached.

An epoch shows each image in one view, and over the epochs all views equally often. Validation and everything after
training see the whole image.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.images import load_image
from frozenprefix.data.samples import ImageGroup

# corners in turn, so that two crops see different halves of the image, then the centre
_PLACES = [(0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]
MAX_CROPS = len(_PLACES)
# texts that are wrong for a mirror image
_SIDES = re.compile(r"\b(left|right)(most|ward|wards)?\b", re.IGNORECASE)


class View(NamedTuple):
    """A part of an image, mirrored or not.

    Args:
        name: of the view, in names of folders.
        box: left, top, right, bottom as shares of the image's sides.

    Example:
        >>> View("left-half", (0.0, 0.0, 0.5, 1.0))(image).size, image.size
        ((24, 48), (48, 48))
    """

    name: str
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    mirrored: bool = False

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top, right, bottom = self.box
        if self.box != (0.0, 0.0, 1.0, 1.0):
            width, height = image.size
            x, y = round(left * width), round(top * height)
            image = image.crop((x, y, max(x + 1, round(right * width)), max(y + 1, round(bottom * height))))
        return ImageOps.mirror(image) if self.mirrored else image


class ViewOptions(NamedTuple):
    """Which views there are besides the whole image; a recipe's `data.augmentation` has the same fields.

    Attributes:
        flip: the mirror image; every second crop is mirrored, too.
        crops: 0 to 5: at corners, then at the centre.
        crop_size: share of width and height that a crop keeps.
    """

    flip: bool = True
    crops: int = 2
    crop_size: float = 0.85


def make_views(options: Any) -> list[View]:
    """The views of an image by `ViewOptions`, or an object with these fields; the first is the whole image as it is.

    Example:
        >>> [view.name for view in make_views(ViewOptions(crop_size=0.8))]
        ['whole', 'mirrored', 'crop-1-of-0.8', 'crop-2-of-0.8-mirrored']
    """
    size = options.crop_size
    views = [View("whole"), *([View("mirrored", mirrored=True)] if options.flip else [])]
    for number, (right, down) in enumerate(_PLACES[: options.crops], start=1):
        left, top = (1 - size) * right, (1 - size) * down
        mirrored = options.flip and number % 2 == 0
        name = f"crop-{number}-of-{size:g}" + ("-mirrored" if mirrored else "")
        views.append(View(name, (left, top, left + size, top + size), mirrored))
    return views


@dataclass(frozen=True)
class Augmentation:
    """Model inputs of training images, in the view that is due.

    Args:
        views: as from `make_views`.
        features: a feature cache for each view; None decodes the images.
        image_processor: of the vision encoder, without features.
        seed: decides in which order an image shows its views.

    Example:
        >>> views = make_views(ViewOptions(crops=0))
        >>> augmentation = Augmentation(views, None, processor.image_processor, seed=0)
        >>> group = ImageGroup((image_path,), ())
        >>> augmentation.inputs([(0, 0, group), (1, 0, group)])["pixel_values"].shape  # epoch, number, group
        torch.Size([2, 3, 32, 32])
    """

    views: Sequence[View]
    features: Sequence[FeatureCache] | None
    image_processor: Any
    seed: int

    def choose(self, group: ImageGroup, *, image: int, epoch: int) -> int:
        """Number of the view of a group's images. One whose texts say left or right is not mirrored."""
        allowed = range(len(self.views))
        if any(view.mirrored for view in self.views) and _has_sides(group):
            allowed = [number for number in allowed if not self.views[number].mirrored]  # type: ignore[assignment]
        order = list(allowed)
        random.Random(f"{self.seed}/{image}/views").shuffle(order)
        return order[epoch % len(order)]

    def inputs(self, groups: Sequence[tuple[int, int, ImageGroup]]) -> dict[str, Tensor]:
        """`image_features` or `pixel_values` of groups, each with its epoch and its number."""
        due = [
            (path, self.choose(group, image=image, epoch=epoch))
            for epoch, image, group in groups
            for path in group.images
        ]
        if not due:
            return {}
        if self.features is None:
            images = [self.views[number](load_image(path)) for path, number in due]
            return dict(self.image_processor(images, return_tensors="pt"))
        return {"image_features": torch.stack([self._features(path, number) for path, number in due])}

    def _features(self, path: Path, number: int) -> Tensor:
        assert self.features is not None
        key = self.features[0].key_of(path)  # of the file's content, so that it is the same in all caches
        return torch.from_numpy(self.features[number].get([key])[0]).float()


def _has_sides(group: ImageGroup) -> bool:
    texts = (text for sample in group.samples for text in (*sample.targets, sample.question or ""))
    return any(_SIDES.search(text) for text in texts)
