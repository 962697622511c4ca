"""Images that are read from shards when they are needed, and training sets of several sources."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from frozenprefix.data.cache_format import Manifest
from frozenprefix.data.samplers import BlockOrder, MixedOrder, Order, ShuffledOrder
from frozenprefix.data.samples import ImageGroup, Sample, digest_samples, valid_text
from frozenprefix.errors import BadImageError, DataError
from frozenprefix.utils import content_hash

LISTED = 1000  # images of a list that count as a shard
_CHECKED = 256  # images of a stream whose targets are checked before the first step


class StreamedGroups(Sequence[ImageGroup], ABC):
    """The images of shards, numbered through all of them, in the order of the list of shards. Nothing is kept.

    Args:
        root: folder of the shards, for messages.
        names: of the shards, in a fixed order; sizes: images of each.
        block: images that are shuffled together.
        finish: completes a sample that was read: prompt, id, valid text.

    Attributes:
        manifest: what encoder the features are of, if the shards hold features in place of images.

    Example:
        >>> issubclass(StreamedGroups, Sequence)
        True
    """

    manifest: Manifest | None = None

    def __init__(
        self, root: Path, names: Sequence[str], sizes: Sequence[int], block: int, finish: Callable[[Sample], Sample]
    ):
        self.root, self.names, self.block, self.finish = root, list(names), block, finish
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self._ends = np.cumsum(self.sizes)

    @abstractmethod
    def read(self, shard: int, row: int) -> list[Sample]:
        """The samples at a place of a shard, which show the same images, with the images' bytes.

        Raises:
            DataError: it cannot be read.
        """

    @abstractmethod
    def content(self) -> str:
        """A text that changes with the shards' content."""

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def place(self, index: int) -> tuple[int, int]:
        """Shard, and row in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard] - self.sizes[shard])

    @overload
    def __getitem__(self, index: int) -> ImageGroup: ...

    @overload
    def __getitem__(self, index: slice) -> list[ImageGroup]: ...

    def __getitem__(self, index: int | slice) -> ImageGroup | list[ImageGroup]:
        """The image with its samples.

        Raises:
            BadImageError: `malformed`, or without a target.
        """
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        shard, row = self.place(index)
        try:
            read = [self.finish(valid_text(sample)[0]) for sample in self.read(shard, row)]
        except BadImageError:
            raise
        except DataError as error:
            raise BadImageError("malformed", str(error)) from error
        samples = [replace(s, targets=tuple(text for text in s.targets if text.strip())) for s in read]
        with_targets = tuple(sample for sample in samples if sample.targets)
        if not with_targets:
            raise BadImageError("no target", f"{self.name_of(index)}: got no target, expected a text")
        return ImageGroup(with_targets[0].images, with_targets)

    def __iter__(self) -> Iterator[ImageGroup]:
        return (self[number] for number in range(len(self)))  # an IndexError in `read` is not the end

    def name_of(self, index: int) -> str:
        """Shard and row, for messages."""
        shard, row = self.place(index)
        return f"{self.names[shard]}#{row}"

    def order(self, seed: int) -> BlockOrder:
        return BlockOrder(self.sizes, self.block, seed)

    def digest(self) -> str:
        """Digest of shards, their sizes and their content: what a resumed run must share."""
        sizes = [f"{name} {size}" for name, size in zip(self.names, self.sizes.tolist(), strict=True)]
        return content_hash(*sizes, self.content())[:16]


Groups = Sequence[ImageGroup]


@dataclass(frozen=True)
class TrainingSet(Sequence[ImageGroup]):
    """Training images of several sources, each a list or streamed from shards, numbered through all of them.

    Attributes:
        sources: of the images.
        weights: share of each source in the steps; None: every image once an epoch.

    Example:
        >>> group = ImageGroup((Path("1.jpg"),), (Sample("1", (Path("1.jpg"),), ("a dog",)),))
        >>> images = TrainingSet([[group], [group, group]], weights=[1.0, 1.0])
        >>> len(images), images.streamed
        (3, False)
    """

    sources: Sequence[Groups]
    weights: Sequence[float] | None = None

    @property
    def streams(self) -> list[StreamedGroups]:
        """The sources that are streamed."""
        return [source for source in self.sources if isinstance(source, StreamedGroups)]

    @property
    def streamed(self) -> bool:
        """Whether any source is read from shards."""
        return bool(self.streams)

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def place(self, index: int) -> tuple[Groups, int]:
        """Source, and number of the image in it."""
        for source in self.sources:
            if 0 <= index < len(source):
                return source, index
            index -= len(source)
        raise IndexError(index)

    @overload
    def __getitem__(self, index: int) -> ImageGroup: ...

    @overload
    def __getitem__(self, index: slice) -> list[ImageGroup]: ...

    def __getitem__(self, index: int | slice) -> ImageGroup | list[ImageGroup]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        source, number = self.place(index)
        return source[number]

    def name_of(self, index: int) -> str:
        """A name of an image for messages; the image is not read."""
        source, number = self.place(index)
        return source.name_of(number) if isinstance(source, StreamedGroups) else source[number].key

    def order(self, seed: int) -> Order:
        """The order in which a run takes the images."""
        if self.weights is None:
            sizes = [size for source in self.sources for size in _shards_of(source)]
            return BlockOrder(sizes, max((s.block for s in self.streams), default=LISTED), seed)
        orders = [
            source.order(seed) if isinstance(source, StreamedGroups) else ShuffledOrder(len(source), seed)
            for source in self.sources
        ]
        return MixedOrder(orders, [len(source) for source in self.sources], self.weights, seed)

    def digest(self, image_key: Callable[[Path], str] | None = None) -> dict[str, Any]:
        """Digest of the samples that a run depends on; see `digest_samples`."""
        listed = [sample for group in self.listed() for sample in group.samples]
        digest: dict[str, Any] = digest_samples(listed, image_key)
        digest["number"] = len(self)
        return digest | {"shards": [stream.digest() for stream in self.streams]} if self.streams else digest

    def listed(self) -> list[ImageGroup]:
        """The images that are not streamed."""
        return [group for source in self.sources if not isinstance(source, StreamedGroups) for group in source]

    def to_check(self) -> list[ImageGroup]:
        """All images of lists, and the first ones of every stream that can be read."""
        groups = self.listed()
        for stream in self.streams:
            for number in range(min(_CHECKED, len(stream))):
                try:
                    groups.append(stream[number])
                except BadImageError:
                    continue  # counted when a step takes it
        return groups


def known_groups(groups: Groups) -> Groups:
    """The images that checks before the first step look at: all of them, but of every stream only the first ones.

    Example:
        >>> known_groups([])
        []
    """
    return groups.to_check() if isinstance(groups, TrainingSet) else groups


def _shards_of(source: Groups) -> list[int]:
    if isinstance(source, StreamedGroups):
        return source.sizes.tolist()
    return [min(LISTED, len(source) - start) for start in range(0, len(source), LISTED)]
