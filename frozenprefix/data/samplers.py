"""Which images and which targets a step trains on, as pure functions of the seed and the step.

No state is kept between steps, so a resumed run continues with exactly the images that were due, and a step is the same
for any number of processes.
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

    Example:
        >>> stream = ImageStream(num_images=3, images_per_step=2, seed=0)
        >>> [stream.step(step) for step in range(3)]
        [[(0, 2), (0, 0)], [(0, 1), (1, 2)], [(1, 0), (1, 1)]]
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
        # from seed and epoch alone: any step can be computed without those before it, as a resumed run has to
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.num_images)
        return epoch, int(self._order[within])


def choose_targets(targets: Sequence[T], count: int | None, *, seed: int, image: int, epoch: int) -> list[T]:
    """Take `count` of an image's targets; over the epochs, all of them are taken equally often.

    Example:
        >>> [choose_targets(["a", "b", "c"], 2, seed=0, image=0, epoch=epoch) for epoch in range(3)]
        [['a', 'c'], ['b', 'a'], ['c', 'b']]
    """
    if count is None or count >= len(targets):
        return list(targets)
    # one random order per image, of which every epoch takes the next `count` in a circle
    order = list(range(len(targets)))
    random.Random(f"{seed}/{image}").shuffle(order)
    return [targets[order[(epoch * count + i) % len(order)]] for i in range(count)]
