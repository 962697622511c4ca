"""Which images and which targets a step trains on, as pure functions of the seed and the step.

No state is kept between steps, so a resumed run continues with exactly the images that were due, and a step is the same
for any number of processes and workers. An order says which image is at a place of the endless stream of epochs:

| order | used for | memory |
|---|---|---|
| `ShuffledOrder` | images in a list | a permutation of all of them |
| `BlockOrder` | images in shards | a permutation of the shards, and one of the images of a block |
| `MixedOrder` | several sources by weight | those of its parts |
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np

T = TypeVar("T")
_PERIOD = 1000  # places over which the shares of a mixture are exact


class Order(Protocol):
    """Which image is at a place of an endless stream of epochs."""

    def at(self, place: int) -> tuple[int, int]:
        """(epoch, image) at a place, counted from 0. Any place can be asked for, in any order."""


class ShuffledOrder:
    """All images of every epoch in a random order.

    Example:
        >>> order = ShuffledOrder(3, seed=0)
        >>> [order.at(place) for place in range(4)]
        [(0, 2), (0, 0), (0, 1), (1, 2)]
    """

    def __init__(self, num_images: int, seed: int):
        self.num_images, self.seed = num_images, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def at(self, place: int) -> tuple[int, int]:
        epoch, within = divmod(place, self.num_images)
        # from seed and epoch alone: any step can be computed without those before it, as a resumed run has to
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.num_images)
        return epoch, int(self._order[within])


class BlockOrder:
    """The images of shards: in every epoch the shards in a random order, cut into blocks, and each block shuffled.

    A block is a run of whole shards with about `block` images, so that what is read at a time lies in few shards.
    Images are numbered through all shards in the order of `sizes`. Nothing but seed, epoch and these numbers decides.

    Args:
        sizes: images of each shard, at least one in all.
        block: images that are shuffled together; a block ends with the shard that reaches it.
        seed: of the shuffling.

    Example:
        >>> order = BlockOrder([2, 1, 2], block=2, seed=1)
        >>> [order.at(place) for place in range(5)]
        [(0, 0), (0, 1), (0, 4), (0, 2), (0, 3)]
    """

    def __init__(self, sizes: Sequence[int] | np.ndarray, block: int, seed: int):
        self.block, self.seed = block, seed
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self.num_images = int(self._sizes.sum())
        self._epoch, self._block = -1, (-1, -1)

    def at(self, place: int) -> tuple[int, int]:
        epoch, within = divmod(place, self.num_images)
        if epoch != self._epoch:
            self._begin(epoch)
        number = int(np.searchsorted(self._block_starts, within, side="right")) - 1
        if (epoch, number) != self._block:
            self._shuffle(epoch, number)
        return epoch, int(self._images[within - self._block_starts[number]])

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        self._shards = np.random.default_rng([self.seed, epoch]).permutation(len(self._sizes))
        before = np.cumsum(self._sizes[self._shards]) - self._sizes[self._shards]
        # the first shard of each block: the one that begins in the block's part of the epoch
        self._firsts = np.unique(before // self.block, return_index=True)[1]
        self._block_starts = before[self._firsts]

    def _shuffle(self, epoch: int, number: int) -> None:
        last = self._firsts[number + 1] if number + 1 < len(self._firsts) else len(self._shards)
        shards = self._shards[self._firsts[number] : last]
        images = np.concatenate([np.arange(self._starts[s], self._starts[s] + self._sizes[s]) for s in shards])
        self._images = np.random.default_rng([self.seed, epoch, number]).permutation(images)
        self._block = epoch, number


class MixedOrder:
    """Several orders, each with its share of all places. Every source passes through epochs of its own.

    In every thousand places each source has its share, rounded to a whole number, in a random order.

    Args:
        orders: of the sources; images are numbered through all of them.
        sizes: images of each source.
        weights: relative shares, each above 0.
        seed: of the shuffling.

    Example:
        >>> order = MixedOrder([ShuffledOrder(10, seed=0), ShuffledOrder(2, seed=0)], [10, 2], [0.9, 0.1], seed=0)
        >>> sum(order.at(place)[1] >= 10 for place in range(1000))
        100
    """

    def __init__(self, orders: Sequence[Order], sizes: Sequence[int], weights: Sequence[float], seed: int):
        self.orders, self.seed = orders, seed
        self._offsets = [sum(sizes[:number]) for number in range(len(sizes))]
        self._counts = whole_shares(weights, _PERIOD)
        self._sources = np.repeat(np.arange(len(orders)), self._counts)
        self._period = -1

    def at(self, place: int) -> tuple[int, int]:
        period, within = divmod(place, _PERIOD)
        if period != self._period:
            self._period = period
            self._order = np.random.default_rng([self.seed, period]).permutation(self._sources)
            self._seen = np.empty(_PERIOD, dtype=np.int64)  # places of the same source before, in this period
            for number in range(len(self.orders)):
                own = self._order == number
                self._seen[own] = np.arange(own.sum())
        number = int(self._order[within])
        epoch, image = self.orders[number].at(period * self._counts[number] + int(self._seen[within]))
        return epoch, self._offsets[number] + image


def whole_shares(weights: Sequence[float], total: int) -> list[int]:
    """Divide `total` by weights into whole numbers, each at least 1: the largest remainders are rounded up.

    Example:
        >>> whole_shares([0.3, 0.3, 0.4], 10), whole_shares([1e-9, 1.0], 10)
        ([3, 3, 4], [1, 9])
    """
    exact = [max(1.0, total * weight / sum(weights)) for weight in weights]
    counts = [int(share) for share in exact]
    missing = total - sum(counts)
    if missing > 0:
        order = sorted(range(len(counts)), key=lambda number: counts[number] - exact[number])
        for number in (order * (missing // len(order) + 1))[:missing]:
            counts[number] += 1
    for _ in range(-missing):  # tiny weights were rounded up to one place
        counts[counts.index(max(counts))] -= 1
    return counts


class ImageStream:
    """An endless stream of epochs, read in steps of `images_per_step`.

    Args:
        num_images: images in the training set.
        images_per_step: images of one optimizer step, over all processes.
        seed: of the shuffling.
        order: of the images; by default all of them are shuffled.

    Example:
        >>> stream = ImageStream(num_images=3, images_per_step=2, seed=0)
        >>> [stream.step(step) for step in range(3)]
        [[(0, 2), (0, 0)], [(0, 1), (1, 2)], [(1, 0), (1, 1)]]
    """

    def __init__(self, num_images: int, images_per_step: int, seed: int, order: Order | None = None):
        self.num_images = num_images
        self.images_per_step = images_per_step
        self.seed = seed
        self.order: Order = ShuffledOrder(num_images, seed) if order is None else order

    def step(self, step: int) -> list[tuple[int, int]]:
        """(epoch, image) pairs of optimizer step `step`, counted from 0."""
        first = step * self.images_per_step
        return [self.order.at(place) for place in range(first, first + self.images_per_step)]


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
