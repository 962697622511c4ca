"""A few real steps of a recipe, and a few real images through its encoder, by the clock of this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch

from frozenprefix.config.recipe import Recipe
from frozenprefix.config.sections import DataSection
from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.cache_writer import encode_images
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.data.images import BadImages, load_image
from frozenprefix.data.samples import ImageGroup
from frozenprefix.errors import BadImageError, DataError
from frozenprefix.kernels.prepack import prepacked_frozen_weights
from frozenprefix.planning.costs import StepShape
from frozenprefix.training.trainer import Trainer
from frozenprefix.training.validation import validation_losses

WARM_UP_STEPS = 2
LEAST_STEPS, MOST_STEPS = 3, 40
PIECE = 256  # images that are encoded at once, at most, to take the time


class RandomFeatures:
    """Stands in for a feature cache where nothing but shapes and time matters."""

    def __init__(self, tokens: int, dim: int):
        self._one = np.random.default_rng(0).standard_normal((1, tokens, dim)).astype(np.float16)

    def key_of(self, path: Path) -> str:
        return str(path)

    def get(self, keys: Sequence[str]) -> np.ndarray:
        return self._one.repeat(len(keys), axis=0)

    @classmethod
    def of(cls, tokens: int, dim: int) -> FeatureCache:
        return cast(FeatureCache, cls(tokens, dim))


@dataclass(frozen=True)
class MeasuredSteps:
    """Training steps that were run: their sizes and seconds, and the seconds of validation per image."""

    shapes: list[StepShape]
    seconds: list[float]
    validation_seconds: float


class StepTimer(Trainer):
    """A trainer that takes a few steps on random features and writes nothing."""

    def __init__(self, recipe: Recipe):
        # whatever the recipe's length is, there have to be enough steps
        training = recipe.training.model_copy(update={"max_steps": 10**6, "epochs": None, "max_minutes": None})
        super().__init__(recipe.model_copy(update={"training": training}))

    def run_steps(self, groups: dict[str, list[ImageGroup]], seconds: float) -> MeasuredSteps:
        """Warm up, then take steps for about `seconds`, and validate on one batch."""
        self.build_model()
        encoder = self.model.vision_encoder
        self.use_data(groups, RandomFeatures.of(encoder.num_tokens, encoder.encoder_dim))
        self.prepare_optimizer()
        self.model.train()
        parts: list[Any] = []

        def remembered() -> Iterator[dict[str, Any]]:
            for batch in self.batches():
                parts.append(batch["packed"])
                yield batch

        batches = remembered()
        shapes: list[StepShape] = []
        times: list[float] = []
        with prepacked_frozen_weights(self.model.language_model):
            for _ in range(WARM_UP_STEPS):
                self.step(batches)
            while len(times) < LEAST_STEPS or (sum(times) < seconds and len(times) < MOST_STEPS):
                parts.clear()
                before = time.perf_counter()
                self.step(batches)  # ends with reading the loss, so a GPU has finished too
                times.append(time.perf_counter() - before)
                shapes.append(StepShape.of(parts))
            return MeasuredSteps(shapes, times, self._time_validation())

    def _time_validation(self) -> float:
        groups = self.validation_groups[: max(2, self.settings.images_per_step)]
        if len(groups) < 2:
            return 0.0
        before = time.perf_counter()
        validation_losses(self.model, self.collator, groups, self.settings.images_per_step)
        return (time.perf_counter() - before) / len(groups)


@dataclass(frozen=True)
class MeasuredEncoding:
    """Images per second from files to the cache, and the seconds that one core needs to read an image."""

    images_per_second: float
    decode_seconds: float


def time_encoding(encoder: ImageEncoder, paths: Sequence[Path], data: DataSection, seconds: float) -> MeasuredEncoding:
    """Encode images into a cache that is thrown away, more each time, until it takes about `seconds`.

    Raises:
        DataError: when none of them can be read.
    """
    spread = paths[:: max(1, len(paths) // PIECE)][:PIECE]
    count, rate, spent = min(8, len(spread)), 0.0, 0.0
    with TemporaryDirectory() as folder:
        for number in range(6):
            bad = BadImages()
            before = time.perf_counter()
            encode_images(
                spread[:count],
                lambda pixel_values: encoder.encode(torch.cat(pixel_values)).cpu().numpy(),
                Path(folder) / str(number),
                encoder.fingerprint,
                dtype=data.feature_dtype,
                transform=lambda image: encoder.pixel_values([image]),
                batch_size=encoder.batch_size,
                workers=max(1, data.workers),
                bad=bad,
                max_bad_share=1.0,
            )
            took = time.perf_counter() - before
            spent += took
            rate = max(rate, (count - len(bad)) / took)  # the best one: whatever else ran made the others slower
            if number and spent > seconds:
                break
            count = max(count, min(len(spread), int(rate * seconds / 2)))
    if not rate:
        raise DataError(f"data: none of {count} images can be read; run `frozenprefix data check`")
    return MeasuredEncoding(rate, _time_decoding(encoder, spread))


def _time_decoding(encoder: ImageEncoder, paths: Sequence[Path], count: int = 16) -> float:
    read, spent = 0, 0.0
    for path in islice(cycle(paths), count):
        before = time.perf_counter()
        try:
            encoder.pixel_values([load_image(path)])
        except BadImageError:
            continue
        spent += time.perf_counter() - before
        read += 1
    return spent / max(1, read)


@torch.no_grad()
def black_image(encoder: ImageEncoder) -> torch.Tensor:
    """float[1, 3, H, W] of the encoder's size and dtype."""
    weight = next(encoder.module.parameters())
    size = encoder.module.image_size
    return torch.zeros(1, 3, size, size, dtype=weight.dtype, device=weight.device)
