"""What a recipe costs before it is run: parameters, memory, arithmetic, disk and time, here and on other machines."""

from __future__ import annotations

import math
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from frozenprefix.config.base_recipe import BaseRecipe
from frozenprefix.config.recipe import Recipe
from frozenprefix.data.cache import FeatureCache, ImageKeys
from frozenprefix.data.cache_format import MANIFEST, Manifest, StorageDType
from frozenprefix.data.collation import Collator, StepDataset
from frozenprefix.data.features import feature_folder
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.data.samplers import ImageStream
from frozenprefix.data.samples import ImageGroup, group_by_images
from frozenprefix.errors import ConfigError
from frozenprefix.models.configuration import LanguageModelConfig
from frozenprefix.models.freezing import count_parameters
from frozenprefix.models.fusion import FUSIONS
from frozenprefix.models.language_model.loading import load_tokenizer, resolve_language_model
from frozenprefix.models.mappers import build_mapper
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.planning import costs
from frozenprefix.planning.calibration import (
    MeasuredEncoding,
    MeasuredSteps,
    RandomFeatures,
    StepTimer,
    black_image,
    time_encoding,
)
from frozenprefix.planning.costs import LanguageModelShape, StepShape
from frozenprefix.planning.hardware import HARDWARE
from frozenprefix.planning.limits import known_recipe
from frozenprefix.training.setup import images_of, load_parts

SAMPLED_STEPS = 24
SCALES = (1_000_000, 100_000_000)
INDEX_BYTES = 85  # an image's line in the index of its shard
KEY_BYTES = 90  # and in the list of keys, its path not counted
SHARD_IMAGES, SHARD_BYTES = 500, 5_200  # a tar file is filled up to 10,240 bytes: half of that on average


@dataclass(frozen=True)
class MachinePlan:
    """A recipe on one machine.

    Attributes:
        seconds_per_step: of training; encode_per_second: images from files to the cache.
        seconds_to_encode: the images that are not in the cache yet; seconds_to_train: all steps and validations.
        steps: that are taken; fewer than planned when `max_minutes` ends the run.
        fits: whether memory suffices, None when unknown.
    """

    label: str
    seconds_per_step: float
    encode_per_second: float
    seconds_to_encode: float
    seconds_to_train: float
    steps: int
    fits: bool | None


@dataclass(frozen=True)
class Plan:
    """All figures of a plan. Bytes, seconds and operations; `machines` by name, "here" first when it was measured."""

    name: str
    parameters: dict[str, int]
    memory: dict[str, float]
    step: StepShape
    images_per_step: int
    flops: dict[str, float]
    bytes: dict[str, float]
    encoder_flops: float
    images: dict[str, int]
    cache_bytes_per_image: int
    cache_bytes: int
    machines: dict[str, MachinePlan]
    scale: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    planned_recipe: BaseRecipe, hardware: Sequence[str] = ("h100", "a100", "rtx4090", "cpu"), *, calibrate: float = 4.0
) -> Plan:
    """Work out what a recipe costs.

    Shapes are counted on training batches that the run itself will see, and models of which only the shape is needed
    are not loaded.

    Args:
        hardware: names in `HARDWARE`.
        calibrate: seconds of real training steps for the time on this machine; 0 leaves this machine out, and then the
            language model's weights are not needed.

    Raises:
        ConfigError: for a name that is not in the table, and for parts of a recipe whose cost is not known.
        FrozenPrefixError: as training the recipe would.
    """
    machines = {name: HARDWARE.get(name) for name in hardware}
    recipe = known_recipe(planned_recipe)
    samples = load_parts(recipe.data)
    groups = {part: group_by_images(listed) for part, listed in samples.items()}
    encoder = ImageEncoder.from_config(recipe.model.vision_encoder)
    lm = language_model_shape(recipe.model.language_model)
    tokens, dim = encoder.module.num_tokens, encoder.module.encoder_dim
    images_per_step = recipe.training.images_per_step
    with torch.device("meta"):
        mapper = build_mapper(
            recipe.model.mapper, encoder_dim=dim, num_tokens=tokens, lm_dim=lm.hidden, embedding_rms=1.0
        )
        mapper_flops = costs.mapper_flops(mapper, torch.empty(images_per_step, tokens, dim))
    trainable = count_parameters(mapper).trainable
    step = StepShape.mean(sample_steps(recipe, groups["train"], encoder))
    encoder_flops, encoder_bytes = costs.encoder_cost(encoder.module, black_image(encoder))
    sizes = [(p.numel(), p.dtype.itemsize) for p in encoder.module.parameters()]
    memory = costs.step_memory(lm, step, encoder_bytes=sum(n * size for n, size in sizes), trainable=trainable)
    flops = costs.step_flops(lm, step, mapper_flops)
    moved = costs.step_bytes(lm, step, trainable)
    paths = images_of(group for listed in groups.values() for group in listed)
    per_image = cached_bytes(recipe.data.feature_dtype, tokens, dim)
    run = _Run.of(recipe, groups, len(paths) - _count_cached(recipe, encoder, paths))

    planned: dict[str, MachinePlan] = {}
    if calibrate:
        encoding = time_encoding(encoder, paths, recipe.data, calibrate / 2)
        measured = StepTimer(recipe).run_steps(groups, calibrate)
        planned["here"] = _here(run, lm, step, mapper_flops, measured, encoding)
        decode = encoding.decode_seconds
    else:
        decode = time_encoding(encoder, paths[:8], recipe.data, 0.0).decode_seconds
    half = recipe.training.precision != "fp32"
    for name, machine in machines.items():
        seconds = machine.seconds(sum(flops.values()), sum(moved.values()), half=half, layers=lm.layers)
        encode = machine.encode_seconds(encoder_flops, encoder_bytes, decode, half=half)
        # no backward pass, but two forward passes: about as much as training on the image
        validation = seconds / images_per_step
        needed = sum(memory.values()) - (memory[costs.PREPACKED_COPIES] if machine.kind == "gpu" else 0)
        fits = None if machine.memory is None else needed < 0.9 * machine.memory
        planned[name] = run.on(machine.label, seconds, 1 / encode, validation, fits)
    return Plan(
        name=recipe.name,
        parameters={
            "trainable": trainable,
            "language model": lm.parameters,
            "vision encoder": sum(n for n, _ in sizes),
        },
        memory=memory,
        step=step,
        images_per_step=images_per_step,
        flops=flops,
        bytes=moved,
        encoder_flops=encoder_flops,
        images={"all": len(paths), "cached": len(paths) - run.to_encode, "train": len(groups["train"])},
        cache_bytes_per_image=per_image,
        cache_bytes=cache_size(recipe.data.feature_dtype, tokens, dim, paths),
        machines=planned,
        scale=[_at_scale(count, per_image, images_per_step, planned) for count in SCALES],
    )


def language_model_shape(config: LanguageModelConfig) -> LanguageModelShape:
    """Shape of a causal LM, from its config alone; `ConfigError` for an encoder-decoder."""
    found = resolve_language_model(config)
    lm_config = AutoConfig.from_pretrained(found.location, revision=found.revision or "main")
    if lm_config.is_encoder_decoder:
        raise ConfigError(
            f"model.language_model: the cost of an encoder-decoder model ({lm_config.model_type}) is not known to "
            "`plan`; train it right away"
        )
    with torch.device("meta"):
        return LanguageModelShape.of(AutoModelForCausalLM.from_config(lm_config, dtype=getattr(torch, config.dtype)))


def sample_steps(recipe: Recipe, groups: Sequence[ImageGroup], encoder: ImageEncoder) -> list[StepShape]:
    """Sizes of training steps spread over the run, packed as they will be."""
    settings = recipe.training
    processor = FrozenPrefixProcessor(
        encoder.image_processor,
        load_tokenizer(recipe.model.language_model),
        prefix_length=FUSIONS.get(recipe.model.fusion.type).placeholders(recipe.model.mapper.prefix_length),
        prompts=recipe.data.prompts,
    )
    collator = Collator(
        processor,
        RandomFeatures.of(1, 1),
        packing=settings.packing,
        tokens_per_row=settings.tokens_per_row,
        max_target_tokens=settings.max_target_tokens,
    )
    parts = settings.gradient_accumulation_steps
    steps = _count_steps(recipe, len(groups))
    dataset = StepDataset(
        groups,
        ImageStream(len(groups), settings.images_per_step, recipe.seed),
        collator,
        num_steps=steps,
        targets_per_image=settings.targets_per_image,
        num_parts=parts,
        parts=range(parts),
    )
    chosen = sorted({round(i * (steps - 1) / max(1, SAMPLED_STEPS - 1)) for i in range(SAMPLED_STEPS)})
    return [StepShape.of([dataset[i * parts + part]["packed"] for part in range(parts)]) for i in chosen]


def cached_bytes(dtype: StorageDType, tokens: int, dim: int) -> int:
    """Bytes that one image takes in the cache: tar members with their headers, and its line in the index."""
    manifest = Manifest({}, dtype, tokens, dim)
    members = [manifest.features_length] + ([manifest.scale_length] if dtype == "int8" else [])
    block = tarfile.BLOCKSIZE
    return sum(block + -(-length // block) * block for length in members) + INDEX_BYTES


def cache_size(dtype: StorageDType, tokens: int, dim: int, paths: Sequence[Path]) -> int:
    """Bytes of a whole cache folder."""
    keys = sum(len(str(path.absolute())) + KEY_BYTES for path in paths)
    shards = -(-len(paths) // SHARD_IMAGES)
    return len(paths) * cached_bytes(dtype, tokens, dim) + keys + shards * SHARD_BYTES


@dataclass(frozen=True)
class _Run:
    """How much there is to do: images to encode, steps, images to validate on in all, and the limit in minutes."""

    to_encode: int
    steps: int
    validated: int
    max_minutes: float | None
    images_per_step: int
    cached: bool

    @classmethod
    def of(cls, recipe: Recipe, groups: dict[str, list[ImageGroup]], to_encode: int) -> _Run:
        settings = recipe.training
        steps = _count_steps(recipe, len(groups["train"]))
        images = len(groups.get("validation", [])[: settings.validation_images])
        # before the first step, every validate_every steps, and at the end
        times = 1 + math.ceil(steps / settings.validate_every)
        return cls(
            to_encode,
            steps,
            images * times,
            settings.max_minutes,
            settings.images_per_step,
            recipe.data.feature_cache != "off",
        )

    def on(
        self,
        label: str,
        step: float,
        encode_per_second: float,
        validation: float,
        fits: bool | None = None,
    ) -> MachinePlan:
        """Args: seconds of a step, images encoded a second, seconds of validation per image."""
        if not self.cached:  # images are then encoded in every step
            step += self.images_per_step / encode_per_second
            validation += 1 / encode_per_second
        seconds = self.steps * step + self.validated * validation
        limit = math.inf if self.max_minutes is None else 60 * self.max_minutes
        return MachinePlan(
            label,
            seconds_per_step=step,
            encode_per_second=encode_per_second,
            seconds_to_encode=self.to_encode / encode_per_second if self.cached else 0.0,
            seconds_to_train=min(seconds, limit),
            steps=round(self.steps * min(1.0, limit / seconds)),
            fits=fits,
        )


def _here(
    run: _Run,
    lm: LanguageModelShape,
    step: StepShape,
    mapper_flops: float,
    measured: MeasuredSteps,
    encoding: MeasuredEncoding,
) -> MachinePlan:
    """The mean step takes what the measured ones took, for the work that it has more or less than they had."""
    work = [sum(costs.step_flops(lm, shape, mapper_flops).values()) for shape in measured.shapes]
    rates = sorted(seconds / flops for seconds, flops in zip(measured.seconds, work, strict=True))
    seconds = rates[len(rates) // 2] * sum(costs.step_flops(lm, step, mapper_flops).values())
    return run.on("this machine", seconds, encoding.images_per_second, measured.validation_seconds)


def _at_scale(images: int, per_image: int, images_per_step: int, machines: dict[str, MachinePlan]) -> dict[str, Any]:
    """What that many images cost to cache and to train on once."""
    return {
        "images": images,
        "cache_bytes": images * per_image,
        "machines": {
            name: {
                "encode_hours": images / machine.encode_per_second / 3600,
                "epoch_hours": images / images_per_step * machine.seconds_per_step / 3600,
            }
            for name, machine in machines.items()
        },
    }


def _count_steps(recipe: Recipe, images: int) -> int:
    settings = recipe.training
    return settings.max_steps or -(-(settings.epochs or 1) * images // settings.images_per_step)


def _count_cached(recipe: Recipe, encoder: ImageEncoder, paths: Sequence[Path]) -> int:
    """Images whose features are there, as far as is known without reading the images."""
    if recipe.data.feature_cache == "off":
        return 0
    folder = feature_folder(recipe.data.feature_storage, encoder.fingerprint)
    if not (folder / MANIFEST).exists():
        return 0
    cache, keys = FeatureCache.open(folder, encoder.fingerprint), ImageKeys(folder)
    return sum(keys.lookup(path) in cache for path in paths)
