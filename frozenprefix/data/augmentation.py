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
from pydantic import ConfigDict, Field
from torch import Tensor

from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.images import load_image
from frozenprefix.data.samples import ImageGroup
from frozenprefix.errors import Problem
from frozenprefix.models.section import Section

# corners in turn, so that two crops see different halves of the image, then the centre
_PLACES = [(0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]
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


class AugmentationOptions(Section):
    """Views of the training images besides the whole image; each is encoded and cached once.

    Example:
        >>> [view.name for view in AugmentationOptions(crop_size=0.8).views]
        ['whole', 'mirrored', 'crop-1-of-0.8', 'crop-2-of-0.8-mirrored']
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    flip: bool = Field(True, description="the mirror image; not for images whose texts say left or right")
    crops: int = Field(
        2, ge=0, le=len(_PLACES), description="at corners, then at the centre; with flip every second one is mirrored"
    )
    crop_size: float = Field(0.85, gt=0.1, lt=1, description="share of width and height that a crop keeps")

    def problems(self) -> list[Problem]:
        if self.flip or self.crops:
            return []
        return [Problem("got no flip and 0 crops, which has no effect; give one, or remove the block", ("crops",))]

    @property
    def views(self) -> list[View]:
        """The views of an image; the first is the whole image as it is."""
        size = self.crop_size
        views = [View("whole"), *([View("mirrored", mirrored=True)] if self.flip else [])]
        for number, (right, down) in enumerate(_PLACES[: self.crops], start=1):
            left, top = (1 - size) * right, (1 - size) * down
            mirrored = self.flip and number % 2 == 0
            name = f"crop-{number}-of-{size:g}" + ("-mirrored" if mirrored else "")
            views.append(View(name, (left, top, left + size, top + size), mirrored))
        return views


@dataclass(frozen=True)
class Augmentation:
    """Model inputs of training images, in the view that is due.

    Args:
        views: of `AugmentationOptions`.
        features: a feature cache for each view; None decodes the images.
        image_processor: of the vision encoder, without features.
        seed: decides in which order an image shows its views.

    Example:
        >>> augmentation = Augmentation(AugmentationOptions(crops=0).views, None, processor.image_processor, seed=0)
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
        sides = _has_sides(group)
        order = [number for number, view in enumerate(self.views) if not (sides and view.mirrored)]
        # another order after every round, or a view would always come with the same of the image's texts
        rounds, place = divmod(epoch, len(order))
        random.Random(f"{self.seed}/{image}/{rounds}/views").shuffle(order)
        return order[place]

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
