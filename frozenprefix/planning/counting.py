"""Real steps of any recipe, on random features: what they compute, keep and take."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from frozenprefix.config import ContrastiveRecipe, Recipe
from frozenprefix.data.images import BadImages
from frozenprefix.data.samples import ImageGroup
from frozenprefix.kernels.prepack import prepackable_layers, prepacked_bytes, prepacked_frozen_weights
from frozenprefix.models.vision.precomputed import feature_table
from frozenprefix.planning.calibration import MAX_STEPS, MIN_STEPS, WARM_UP_STEPS, RandomFeatures, endless
from frozenprefix.planning.costs import StepShape
from frozenprefix.training.contrastive import ContrastiveTrainer
from frozenprefix.training.setup import PreparedImages, add_similar_captions
from frozenprefix.training.trainer import Trainer

COUNTED_IMAGES = 256  # from which the counted steps are made


@dataclass(frozen=True)
class CountedStep:
    """A step as it was counted, and the time of a few.

    Attributes:
        parameters: number by part; "trainable" first.
        flops: operations; kept_bytes: largest amount that autograd kept for the backward pass.
        weight_bytes: of all parts; prepacked_bytes: of the copies that training makes on a CPU.
        seconds: of a step, and of validation on an image; None where nothing was measured.
        encodes: whether the step encodes its images itself.
    """

    parameters: dict[str, int]
    shape: StepShape
    flops: float
    kept_bytes: float
    weight_bytes: int
    prepacked_bytes: int
    layers: int
    seconds: tuple[float, float] | None
    encodes: bool


def count_steps_of(
    recipe: Recipe | ContrastiveRecipe, groups: dict[str, list[ImageGroup]], calibrate: float
) -> CountedStep:
    """Build the model of a recipe, count one step, and measure others for about `calibrate` seconds (0: none).

    Example:
        >>> from frozenprefix.data.samples import group_by_images
        >>> from frozenprefix.training.setup import load_parts
        >>> groups = {part: group_by_images(samples) for part, samples in load_parts(recipe.data).items()}
        >>> count_steps_of(recipe, groups, calibrate=0).flops > 0
        True
    """
    trainer = _trainer_of(recipe, groups)
    model, batches = trainer.model, trainer.batches()
    parts = getattr(trainer.settings, "gradient_accumulation_steps", 1)
    meter = KeptMeter(frozenset(p.untyped_storage().data_ptr() for p in model.parameters()))
    step = list(islice(batches, parts))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), meter.counting():
        trainer.step(iter(step))
    shapes, seconds = [_shape_of(step)], None
    if calibrate:
        more, times, validation = _measure(trainer, batches, parts, calibrate)
        shapes, seconds = more, (statistics.median(times), validation)
    numbers = {name: sum(p.numel() for p in part.parameters()) for name, part in _parts_of(model).items()}
    text = _text_model(model)
    return CountedStep(
        {"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad), **numbers},
        StepShape.mean(shapes),
        flops=counter.get_total_flops(),
        kept_bytes=meter.peak,
        weight_bytes=sum(p.nbytes for p in model.parameters()),
        prepacked_bytes=prepacked_bytes(prepackable_layers(text)) if isinstance(trainer, Trainer) else 0,
        layers=getattr(getattr(text, "config", None), "num_hidden_layers", None) or 12,
        seconds=seconds,
        encodes=trainer.collator.features is None,
    )


def _trainer_of(recipe: Recipe | ContrastiveRecipe, groups: dict[str, list[ImageGroup]]) -> Any:
    """A trainer that is ready for steps, writes nothing, and needs no run before it."""
    recipe = endless(recipe)
    trainer: Any = Trainer(recipe) if isinstance(recipe, Recipe) else ContrastiveTrainer(recipe)
    trainer.build_model()
    few = {part: listed[: max(COUNTED_IMAGES, recipe.training.images_per_step)] for part, listed in groups.items()}
    features = _features_for(trainer.model.vision_encoder, recipe)
    if features is not None and recipe.data.retrieval is not None:
        prepared = PreparedImages(few, features, BadImages(), 0, 0)
        add_similar_captions(prepared, recipe.data)
        few = prepared.groups
    trainer.use_data(few, features, features)
    trainer.prepare_optimizer()
    trainer.model.train()
    return trainer


def _features_for(encoder: Any, recipe: Recipe | ContrastiveRecipe) -> Any:
    """Features in place of a cache; None where steps encode their images."""
    if feature_table(encoder) is None and recipe.data.feature_cache == "off":
        return None
    return RandomFeatures(encoder.num_tokens, encoder.encoder_dim).as_cache()


def _measure(
    trainer: Any, batches: Iterator[Any], parts: int, seconds: float
) -> tuple[list[StepShape], list[float], float]:
    """Sizes and seconds of steps, and seconds of validation on an image."""
    shapes: list[StepShape] = []
    times: list[float] = []
    with prepacked_frozen_weights(_text_model(trainer.model)) if isinstance(trainer, Trainer) else nullcontext():
        while len(times) < MIN_STEPS + WARM_UP_STEPS or (sum(times) < seconds and len(times) < MAX_STEPS):
            before = time.perf_counter()
            step = list(islice(batches, parts))
            trainer.step(iter(step))  # reads the loss, so a GPU has finished too
            times.append(time.perf_counter() - before)
            shapes.append(_shape_of(step))
        before = time.perf_counter()
        trainer.validation_groups = trainer.validation_groups[: max(2, trainer.settings.images_per_step)]
        images = len(trainer.validation_groups)
        if images > 1:
            trainer.measure()
        validation = (time.perf_counter() - before) / images if images > 1 else 0.0
    return shapes[WARM_UP_STEPS:], times[WARM_UP_STEPS:], validation


def _shape_of(step: list[Any]) -> StepShape:
    """Size of a step from its micro-batches."""
    if "packed" in step[0]:
        return StepShape.from_parts([part["packed"] for part in step])
    masks = [chunk["attention_mask"] if "attention_mask" in chunk else chunk["input_ids"] for chunk in step[0]["texts"]]
    sizes = [tuple(mask.shape) for mask in masks]
    tokens = sum(int((mask != 0).sum()) for mask in masks)
    cells = [rows * length for rows, length in sizes]
    return StepShape(
        targets=len(step[0]["text_ids"]),
        tokens=tokens,
        nodes=tokens,
        cells=sum(cells),
        scores=sum(rows * length**2 for rows, length in sizes),
        predicted=0,
        row_length=max(length for _, length in sizes),
        part_cells=max(cells),
    )


def _parts_of(model: Any) -> dict[str, nn.Module]:
    name = "language model" if hasattr(model, "lm") else "text tower"
    return {name: _text_model(model), "vision encoder": model.vision_encoder}


def _text_model(model: Any) -> nn.Module:
    return model.language_model if hasattr(model, "lm") else model.text_tower


@dataclass
class KeptMeter:
    """Bytes that autograd keeps for backward passes, each storage once, and their peak.

    Args:
        weights: addresses of storages that are there in any case.

    Example:
        >>> from frozenprefix.planning.counting import KeptMeter
        >>> meter = KeptMeter()
        >>> with meter.counting():
        ...     y = torch.ones(256, requires_grad=True).exp()
        >>> meter.peak
        1024
    """

    weights: frozenset[int] = frozenset()
    now: int = 0
    peak: int = 0
    _held: Counter[int] = field(default_factory=Counter)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count inside the block."""
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept.tensor):
            yield

    def _keep(self, tensor: Tensor) -> _Kept:
        return _Kept(self, tensor)


class _Kept:
    """One tensor that autograd keeps; tells the meter when it is dropped."""

    def __init__(self, meter: KeptMeter, tensor: Tensor):
        self.tensor = tensor.detach()  # a result that knew its graph would keep it, and so itself
        storage = tensor.untyped_storage()
        self._key, self._size = storage.data_ptr(), storage.nbytes()
        self._meter = None if self._key in meter.weights else meter
        if self._meter is not None:
            if not meter._held[self._key]:
                meter.now += self._size
                meter.peak = max(meter.peak, meter.now)
            meter._held[self._key] += 1

    def __del__(self) -> None:
        if self._meter is not None:
            self._meter._held[self._key] -= 1
            if not self._meter._held[self._key]:
                self._meter.now -= self._size
