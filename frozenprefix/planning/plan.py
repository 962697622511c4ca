"""The cost of a recipe before it is run: parameters, memory, arithmetic, disk and time, here and on other machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from frozenprefix.config import ContrastiveRecipe, Recipe, resolve_precision
from frozenprefix.data.cache import FeatureCache, ImageKeys
from frozenprefix.data.cache_format import MANIFEST
from frozenprefix.data.collation import Collator, StepDataset
from frozenprefix.data.features import feature_folder
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.data.samplers import ImageStream
from frozenprefix.data.samples import ImageGroup, group_by_images
from frozenprefix.errors import ConfigError
from frozenprefix.models.configuration import LanguageModelConfig
from frozenprefix.models.freezing import count_parameters
from frozenprefix.models.fusion import FUSIONS
from frozenprefix.models.language_model.loading import language_model_config, load_tokenizer
from frozenprefix.models.mappers import build_mapper
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.planning import costs
from frozenprefix.planning.calibration import (
    RandomFeatures,
    black_image,
    time_encoding,
    time_steps,
)
from frozenprefix.planning.costs import LanguageModelShape, StepShape
from frozenprefix.planning.hardware import HARDWARE
from frozenprefix.planning.limits import plannable_recipe
from frozenprefix.planning.workload import MachinePlan, Workload, count_steps, seconds_per_step
from frozenprefix.training.setup import images_of, load_parts

SAMPLED_STEPS = 24
SCALES = (1_000_000, 100_000_000)


@dataclass(frozen=True)
class Plan:
    """All figures of a plan, in bytes, seconds and operations.

    Attributes:
        memory: bytes in use at the peak of a step, by part.
        step: the mean step; flops, bytes: operations and bytes moved in it, by part.
        machines: by name, "here" first if it was measured.
        scale: cache and time for millions of images.

    Example:
        >>> plan(recipe, ["h100"], calibrate=0).to_dict()["images_per_step"]
        4
    """

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
    recipe: Recipe | ContrastiveRecipe,
    hardware: Sequence[str] = ("h100", "a100", "rtx4090", "cpu"),
    *,
    calibrate: float = 4.0,
) -> Plan:
    """Compute what a recipe costs.

    Shapes are counted on training batches that the run itself will see. Only the encoder's weights are loaded, and for
    calibration those of the language model.

    Args:
        hardware: names in `HARDWARE`.
        calibrate: seconds of real training steps for the time on this machine; 0 leaves this machine out.

    Raises:
        ConfigError: for a name that is not in the table, and for parts of a recipe whose cost is not known.
        FrozenPrefixError: as training the recipe would.

    Example:
        >>> list(plan(recipe, ["h100"], calibrate=0).machines)
        ['h100']
    """
    machines = {name: HARDWARE.get(name) for name in hardware}
    recipe = resolve_precision(plannable_recipe(recipe))
    settings = recipe.training
    samples = load_parts(recipe.data)
    groups = {part: group_by_images(listed) for part, listed in samples.items()}
    paths = images_of(group for listed in groups.values() for group in listed)

    # sizes of the parts
    encoder = ImageEncoder.from_config(recipe.model.vision_encoder)
    tokens, dim = encoder.module.num_tokens, encoder.module.encoder_dim
    encoder_weights = [(p.numel(), p.dtype.itemsize) for p in encoder.module.parameters()]
    lm = language_model_shape(recipe.model.language_model)
    with torch.device("meta"):
        mapper = build_mapper(
            recipe.model.mapper, encoder_dim=dim, num_tokens=tokens, lm_dim=lm.hidden, embedding_rms=1.0
        )
        mapper_flops = costs.mapper_flops(mapper, torch.empty(settings.images_per_step, tokens, dim))
    trainable = count_parameters(mapper).trainable

    # costs of a step and of an image
    step = StepShape.mean(sample_steps(recipe, groups["train"], encoder))
    flops = costs.step_flops(lm, step, mapper_flops)
    moved = costs.step_bytes(lm, step, trainable)
    encoder_bytes = sum(count * size for count, size in encoder_weights)
    memory = costs.step_memory(lm, step, encoder_bytes=encoder_bytes, trainable=trainable)
    image_flops, image_bytes = costs.encoder_cost(encoder.module, black_image(encoder))
    workload = Workload.from_recipe(recipe, groups, len(paths) - _count_cached(recipe, encoder, paths))

    # times on machines
    planned: dict[str, MachinePlan] = {}
    if calibrate:
        encoding = time_encoding(encoder, paths, recipe.data, calibrate / 2)
        measured = time_steps(recipe, groups, calibrate)
        seconds = seconds_per_step(measured, lambda one: sum(costs.step_flops(lm, one, mapper_flops).values()), step)
        planned["here"] = workload.on_machine(
            "this machine", seconds, 1 / encoding.images_per_second, measured.validation_seconds, None
        )
    else:
        encoding = time_encoding(encoder, paths[:8], recipe.data, 0.0)
    half = settings.precision != "fp32"
    for name, machine in machines.items():
        seconds = machine.seconds(sum(flops.values()), sum(moved.values()), half=half, layers=lm.layers)
        encode = machine.encode_seconds(image_flops, image_bytes, encoding.decode_seconds, half=half)
        # no backward pass, but two forward passes: about as much as training on the image
        validation = seconds / settings.images_per_step
        needed = sum(memory.values()) - (memory[costs.PREPACKED_COPIES] if machine.kind == "gpu" else 0)
        fits = None if machine.memory is None else needed < 0.9 * machine.memory
        planned[name] = workload.on_machine(machine.label, seconds, encode, validation, fits)

    per_image = costs.cached_bytes(recipe.data.feature_dtype, tokens, dim)
    encoder_parameters = sum(count for count, _ in encoder_weights)
    return Plan(
        name=recipe.name,
        parameters={"trainable": trainable, "language model": lm.parameters, "vision encoder": encoder_parameters},
        memory=memory,
        step=step,
        images_per_step=settings.images_per_step,
        flops=flops,
        bytes=moved,
        encoder_flops=image_flops,
        images={"all": len(paths), "cached": len(paths) - workload.to_encode, "train": len(groups["train"])},
        cache_bytes_per_image=per_image,
        cache_bytes=costs.cache_size(recipe.data.feature_dtype, tokens, dim, paths),
        machines=planned,
        scale=[_at_scale(count, per_image, settings.images_per_step, planned) for count in SCALES],
    )


def language_model_shape(config: LanguageModelConfig) -> LanguageModelShape:
    """Sizes of a causal LM, from its config alone.

    Raises:
        ConfigError: for an encoder-decoder LM, whose cost is not known.

    Example:
        >>> from frozenprefix.models.configuration import LanguageModelConfig
        >>> language_model_shape(LanguageModelConfig(path=str(lm_folder))).layers
        2
    """
    lm_config = language_model_config(config)
    if lm_config.is_encoder_decoder:
        raise ConfigError(
            f"model.language_model: the cost of an encoder-decoder model ({lm_config.model_type}) is not known to "
            "`plan`"
        )
    with torch.device("meta"):
        return LanguageModelShape.from_model(
            AutoModelForCausalLM.from_config(lm_config, dtype=getattr(torch, config.dtype))
        )


def sample_steps(recipe: Recipe, groups: Sequence[ImageGroup], encoder: ImageEncoder) -> list[StepShape]:
    """Sizes of training steps spread over the run, packed as in training."""
    settings = recipe.training
    processor = FrozenPrefixProcessor(
        encoder.image_processor,
        load_tokenizer(recipe.model.language_model),
        prefix_length=FUSIONS.get(recipe.model.fusion.type).placeholders(recipe.model.mapper.prefix_length),
        prompts=recipe.data.prompts,
    )
    collator = Collator(
        processor,
        RandomFeatures(1, 1).as_cache(),
        packing=settings.packing,
        tokens_per_row=settings.tokens_per_row,
        max_target_tokens=settings.max_target_tokens,
    )
    parts = settings.gradient_accumulation_steps
    steps = count_steps(recipe, len(groups))
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
    return [StepShape.from_parts([dataset[i * parts + part]["packed"] for part in range(parts)]) for i in chosen]


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


def _count_cached(recipe: Recipe, encoder: ImageEncoder, paths: Sequence[Path]) -> int:
    """Images whose features are cached, as far as is known without reading them."""
    if recipe.data.feature_cache == "off":
        return 0
    folder = feature_folder(recipe.data.feature_storage, encoder.fingerprint)
    if not (folder / MANIFEST).exists():
        return 0
    cache, keys = FeatureCache.open(folder, encoder.fingerprint), ImageKeys(folder)
    return sum(keys.lookup(path) in cache for path in paths)
