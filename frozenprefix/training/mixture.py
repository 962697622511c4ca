"""Training sources that are streamed or have weights: from a recipe to a `TrainingSet`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frozenprefix.config.sections import DataSection
from frozenprefix.data.images import BadImages
from frozenprefix.data.samples import (
    ImageGroup,
    Sample,
    check_unique_ids,
    group_by_images,
    with_images,
    with_targets,
)
from frozenprefix.data.sources import load_source, open_source, parse_source
from frozenprefix.data.streaming.groups import StreamedGroups, TrainingSet
from frozenprefix.errors import BadImageError, ConfigError, DataError
from frozenprefix.utils import append_jsonl, report

logger = logging.getLogger(__name__)
_FEW = 1000  # images after which the share of bad ones is judged


@dataclass(frozen=True)
class Mixture:
    """The sources of `data.train`, each as a list or as a stream, before the images of the lists are encoded.

    Attributes:
        sources: samples of each source.
        weights: one for each source, or None.

    Example:
        >>> Mixture.load(recipe.data).weights is None
        True
    """

    sources: list[list[Sample] | StreamedGroups]
    weights: list[float] | None

    @classmethod
    def load(cls, data: DataSection, *, without_images: bool = False) -> Mixture:
        """Read the lists, and open the streams.

        Args:
            without_images: keep samples of lists that show no image.

        Raises:
            DataError, AssetError: as `load_sources`.
        """
        configs = [parse_source(config) for config in data.train]
        sources: list[list[Sample] | StreamedGroups] = []
        for number, config in enumerate(configs):
            if config.streamed:
                sources.append(open_source(config))
                continue
            listed = with_targets(load_source(config), where=f"data.train.{number}")
            sources.append(listed if without_images else with_images(listed, where=f"data.train.{number}"))
        weights = [config.weight for config in configs if config.weight is not None]
        mixture = cls(sources, weights or None)
        check_unique_ids(mixture.listed)
        return mixture

    @property
    def listed(self) -> list[Sample]:
        """The samples of all lists."""
        return [sample for source in self.sources if isinstance(source, list) for sample in source]

    @property
    def streams(self) -> list[StreamedGroups]:
        return [source for source in self.sources if isinstance(source, StreamedGroups)]

    def training_set(self, readable: Iterable[ImageGroup]) -> TrainingSet:
        """The training set, without the listed images that cannot be read.

        Raises:
            DataError: nothing is left of a source.
        """
        paths = {path for group in readable for path in group.images}
        sources: list[Sequence[ImageGroup]] = []
        for number, source in enumerate(self.sources):
            if isinstance(source, StreamedGroups):
                sources.append(source)
                continue
            groups = [group for group in group_by_images(source) if all(path in paths for path in group.images)]
            if not groups:
                raise DataError(f"data.train.{number}: not one image can be read; bad_images.jsonl says why")
            sources.append(groups)
        return TrainingSet(sources, self.weights)


def without_cache(data: DataSection, streams: list[StreamedGroups]) -> DataSection:
    """The section that streams of images need: without a feature cache, whose index would hold a row for each image.

    Raises:
        ConfigError: the recipe names a folder of features.
    """
    if data.feature_cache == "off" or not streams or streams[0].manifest is not None:
        return data
    if data.feature_cache != "auto":
        raise ConfigError(
            f"data.feature_cache: got '{data.feature_cache}', expected 'off' with streamed images; to train from "
            "features, write them into shards with `frozenprefix data build SOURCE OUT --recipe RECIPE`"
        )
    logger.info("data.feature_cache: 'off', as images are streamed; `frozenprefix data build` can store features")
    return data.model_copy(update={"feature_cache": "off", "feature_dtype": "float16"})


class LeftOut:
    """Counts the streamed images that steps of this process leave out, and stops the run when there are too many.

    Args:
        path: JSONL file to list them in; None for none.
        max_share: of the images, 0 to 1.

    Example:
        >>> left_out = LeftOut(None, max_share=0.5)
        >>> list(left_out.watch([{"packed": 1}], images_per_batch=2))
        [{'packed': 1}]
    """

    def __init__(self, path: Path | None, max_share: float):
        self.path, self.max_share, self.bad = path, max_share, BadImages()
        self.seen = 0

    def watch(self, batches: Iterable[Any], images_per_batch: int) -> Iterator[Any]:
        """Pass batches on, without the record of what they left out.

        Raises:
            DataError: more than `max_share` of the images are bad.
        """
        for batch in batches:
            self.seen += images_per_batch
            found = batch.pop("bad", [])
            for item in found:
                self.bad.record(item.name, BadImageError(item.reason, item.message))
            if found:
                reasons, messages = Counter(item.reason for item in found), [item.message for item in found]
                report("data.train, one step", images_per_batch, reasons, what="images", examples=messages)
                if self.path is not None:
                    rows = [{"image": item.name, "reason": item.reason, "message": item.message} for item in found]
                    append_jsonl(self.path, rows)
                self.bad.check(max(self.seen, _FEW), self.max_share)
            yield batch
