"""Which images and which targets a step trains on, as pure functions of the seed and the step.

Nothing is remembered between steps, so a run that was stopped goes on with exactly the images that were due, and any
number of processes sees the same step.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class ImageStream:
    """An endless stream of shuffled epochs, read in steps of `images_per_step`.

    Args:
        num_images: images in the training set.
        images_per_step: images of one optimizer step, over all processes.
        seed: of the shuffling.
    """

    def __init__(self, num_images: int, images_per_step: int, seed: int):
        self.num_images = num_images
        self.images_per_step = images_per_step
        self.seed = seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def step(self, step: int) -> list[tuple[int, int]]:
        """(epoch, image) pairs of optimizer step `step`, counted from 0."""
        first = step * self.images_per_step
        return [self._at(place) for place in range(first, first + self.images_per_step)]

    def _at(self, place: int) -> tuple[int, int]:
        epoch, within = divmod(place, self.num_images)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.num_images)
        return epoch, int(self._order[within])


def choose_targets(targets: Sequence[T], count: int | None, *, seed: int, image: int, epoch: int) -> list[T]:
    """Take `count` of an image's targets, going round all of them evenly over the epochs."""
    if count is None or count >= len(targets):
        return list(targets)
    order = list(range(len(targets)))
    random.Random(f"{seed}/{image}").shuffle(order)
    return [targets[order[(epoch * count + i) % len(order)]] for i in range(count)]
