"""Measured on this machine: a few training steps of a recipe, and a few images through its encoder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

import numpy as np
import torch

from frozenprefix.config.base_recipe import BaseRecipe
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

R = TypeVar("R", bound=BaseRecipe)
WARM_UP_STEPS = 2
MIN_STEPS, MAX_STEPS = 3, 40
MAX_IMAGES = 256  # that are encoded to measure the rate


class RandomFeatures:
    """Random features in place of a feature cache, where only shapes and time matter.

    Args:
        tokens, dim: of the features, float16[n, tokens, dim].

    Example:
        >>> RandomFeatures(4, 64).get(["a", "b"]).shape
        (2, 4, 64)
    """

    def __init__(self, tokens: int, dim: int):
        self._one = np.random.default_rng(0).standard_normal((1, tokens, dim)).astype(np.float16)

    def key_of(self, path: Path) -> str:
        return str(path)

    def keys_of(self, paths: Sequence[Path]) -> list[str]:
        return [self.key_of(path) for path in paths]

    def get(self, keys: Sequence[str]) -> np.ndarray:
        return self._one.repeat(len(keys), axis=0)

    def as_cache(self) -> FeatureCache:
        """Itself, as the type that collators take."""
        return cast(FeatureCache, self)


@dataclass(frozen=True)
class MeasuredSteps:
    """Training steps that were run.

    Attributes:
        shapes, seconds: size and time of each step.
        validation_seconds: time of validation per image.
    """

    shapes: list[StepShape]
    seconds: list[float]
    validation_seconds: float


def step_trainer(recipe: Recipe, groups: dict[str, list[ImageGroup]]) -> Trainer:
    """A trainer that is ready for steps on random features, and that writes nothing.

    Example:
        >>> from frozenprefix.data.samples import group_by_images
        >>> from frozenprefix.training.setup import load_parts
        >>> groups = {part: group_by_images(samples) for part, samples in load_parts(recipe.data).items()}
        >>> trainer = step_trainer(recipe, groups)
        >>> trainer.step(trainer.batches())["loss"] > 0
        True
    """
    trainer = Trainer(endless(recipe))
    trainer.build_model()
    encoder = trainer.model.vision_encoder
    features = RandomFeatures(encoder.num_tokens, encoder.encoder_dim).as_cache()
    trainer.use_data(groups, features, features)
    trainer.prepare_optimizer()
    trainer.model.train()
    return trainer


def endless(recipe: R) -> R:
    """The recipe with enough steps, whatever its length is, and without what other runs have to make first.

    Example:
        >>> endless(recipe).training.max_steps
        1000000
    """
    training: dict[str, Any] = {"max_steps": 10**6, "epochs": None, "max_minutes": None}
    changes: dict[str, Any] = {}
    if isinstance(recipe, Recipe):
        training["init_from"] = None
        changes["evaluation"] = recipe.evaluation.model_copy(update={"text": None})
    return recipe.model_copy(update={**changes, "training": recipe.training.model_copy(update=training)})


def time_steps(recipe: Recipe, groups: dict[str, list[ImageGroup]], seconds: float) -> MeasuredSteps:
    """Warm up, take steps for about `seconds`, and validate on one batch."""
    trainer = step_trainer(recipe, groups)
    batches, parts = trainer.batches(), trainer.settings.gradient_accumulation_steps
    shapes: list[StepShape] = []
    times: list[float] = []
    with prepacked_frozen_weights(trainer.model.language_model):
        for _ in range(WARM_UP_STEPS):
            trainer.step(batches)
        while len(times) < MIN_STEPS or (sum(times) < seconds and len(times) < MAX_STEPS):
            before = time.perf_counter()
            step = list(islice(batches, parts))
            trainer.step(iter(step))  # reads the loss, so a GPU has finished too
            times.append(time.perf_counter() - before)
            shapes.append(StepShape.from_parts([batch["packed"] for batch in step]))
        return MeasuredSteps(shapes, times, _time_validation(trainer))


def _time_validation(trainer: Trainer) -> float:
    """Seconds per image."""
    groups = trainer.validation_groups[: max(2, trainer.settings.images_per_step)]
    if len(groups) < 2:
        return 0.0
    before = time.perf_counter()
    validation_losses(trainer.model, trainer.collator, groups, trainer.settings.images_per_step)
    return (time.perf_counter() - before) / len(groups)


@dataclass(frozen=True)
class MeasuredEncoding:
    """Images per second from files to the cache, and the seconds that one core needs to decode an image."""

    images_per_second: float
    decode_seconds: float


def time_encoding(encoder: ImageEncoder, paths: Sequence[Path], data: DataSection, seconds: float) -> MeasuredEncoding:
    """Encode images into a temporary cache, more in each round, until it takes about `seconds`.

    Raises:
        DataError: when none of them can be read.
    """
    spread = paths[:: max(1, len(paths) // MAX_IMAGES)][:MAX_IMAGES]
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
            rate = max(rate, (count - len(bad)) / took)  # other programs can only slow a round down
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
