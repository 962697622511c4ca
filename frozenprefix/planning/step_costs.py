"""Cost of a training step: by formulas for a mapper alone, and counted on real steps for everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM

from frozenprefix.config import ContrastiveRecipe, Recipe
from frozenprefix.data.collation import Collator, StepDataset
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.data.samplers import ImageStream
from frozenprefix.data.samples import ImageGroup
from frozenprefix.models.configuration import LanguageModelConfig
from frozenprefix.models.freezing import count_parameters
from frozenprefix.models.fusion import FUSIONS
from frozenprefix.models.language_model.loading import language_model_config, load_tokenizer
from frozenprefix.models.mappers import build_mapper
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.planning import costs
from frozenprefix.planning.calibration import RandomFeatures, time_steps
from frozenprefix.planning.costs import LanguageModelShape, OptimizerCosts, StepShape
from frozenprefix.planning.counting import CountedStep, count_steps_of
from frozenprefix.planning.workload import count_steps, seconds_per_step

SAMPLED_STEPS = 24
OTHER_OBJECTIVES = ("contrastive", "distillation", "self_critical")
Groups = dict[str, list[ImageGroup]]


@dataclass(frozen=True)
class StepCosts:
    """Cost of the mean step of a recipe.

    Attributes:
        parameters: number by part; "trainable" first.
        step: its size; flops, bytes: operations and bytes moved, by part; memory: bytes at its peak, by part.
        layers: of the language model or text tower, for the time of launching their operations.
        seconds: of a step here, and of validation on an image; None where nothing was measured.
        encodes: whether the step encodes its images itself.
    """

    parameters: dict[str, int]
    step: StepShape
    flops: dict[str, float]
    bytes: dict[str, float]
    memory: dict[str, float]
    layers: int
    seconds: tuple[float, float] | None = None
    encodes: bool = False


def has_formulas(recipe: Recipe | ContrastiveRecipe) -> bool:
    """Whether only a mapper is trained, between a frozen encoder and a frozen decoder-only LM.

    Example:
        >>> has_formulas(recipe)
        True
    """
    if not isinstance(recipe, Recipe):
        return False
    model = recipe.model
    special = [
        model.vision_encoder.source == "features",
        model.vision_encoder.trainable != "none",
        model.vision_encoder.peft is not None,
        model.fusion.type != "prefix",
        model.language_model.peft is not None,
        recipe.data.text_only is not None,
        recipe.data.retrieval is not None,
        *(getattr(recipe.objectives, name) is not None for name in OTHER_OBJECTIVES),
    ]
    return not any(special) and not language_model_config(model.language_model).is_encoder_decoder


def step_costs(
    recipe: Recipe | ContrastiveRecipe, groups: Groups, encoder: ImageEncoder, *, calibrate: float
) -> StepCosts:
    """The cost of the mean step; formulas load no weights of the LM unless `calibrate` asks for measured seconds.

    Args:
        encoder: the recipe's.
        calibrate: seconds of real training steps; 0 for none.
    """
    if isinstance(recipe, Recipe) and has_formulas(recipe):
        return calculated_costs(recipe, groups, encoder, calibrate)
    return counted_costs(recipe, groups, calibrate)


def calculated_costs(recipe: Recipe, groups: Groups, encoder: ImageEncoder, calibrate: float) -> StepCosts:
    """By formulas, for a recipe that has them; see `has_formulas`."""
    module, images = encoder.module, recipe.training.images_per_step
    lm = language_model_shape(recipe.model.language_model)
    with torch.device("meta"):
        mapper = build_mapper(
            recipe.model.mapper,
            encoder_dim=module.encoder_dim,
            num_tokens=module.num_tokens,
            lm_dim=lm.hidden,
            embedding_rms=1.0,
        )
        mapper_flops = costs.mapper_flops(mapper, torch.empty(images, module.num_tokens, module.encoder_dim))
    trainable, optimizer = count_parameters(mapper).trainable, OptimizerCosts.from_settings(recipe.training)
    weights = [(p.numel(), p.dtype.itemsize) for p in module.parameters()]
    step = StepShape.mean(sample_steps(recipe, groups["train"], encoder))
    seconds = None
    if calibrate:
        measured = time_steps(recipe, groups, calibrate)
        each = seconds_per_step(measured, lambda one: sum(costs.step_flops(lm, one, mapper_flops).values()), step)
        seconds = each, measured.validation_seconds
    return StepCosts(
        {"trainable": trainable, "language model": lm.parameters, "vision encoder": sum(n for n, _ in weights)},
        step,
        flops=costs.step_flops(lm, step, mapper_flops),
        bytes=costs.step_bytes(lm, step, trainable, optimizer),
        memory=costs.step_memory(
            lm,
            step,
            encoder_bytes=sum(count * size for count, size in weights),
            trainable=trainable,
            optimizer=optimizer,
        ),
        layers=lm.layers,
        seconds=seconds,
    )


def counted_costs(recipe: Recipe | ContrastiveRecipe, groups: Groups, calibrate: float) -> StepCosts:
    """Counted on a real step, for any recipe."""
    counted: CountedStep = count_steps_of(recipe, groups, calibrate)
    step, trainable = counted.shape, counted.parameters["trainable"]
    optimizer = OptimizerCosts.from_settings(recipe.training)
    return StepCosts(
        counted.parameters,
        step,
        flops={"a step, counted": counted.flops},
        # weights are read forward and backward; what is kept is written, read by the next operation, and read again
        bytes={
            "weights": 2 * counted.weight_bytes,
            "activations": 3 * counted.kept_bytes,
            "optimizer": optimizer.moved * trainable,
        },
        memory={
            "weights": counted.weight_bytes,
            costs.PREPACKED_COPIES: counted.prepacked_bytes,
            "gradients, optimizer": (optimizer.kept - 4) * trainable,
            "activations": counted.kept_bytes,
            "layer being computed": 2 * counted.kept_bytes / counted.layers,
        },
        layers=counted.layers,
        seconds=counted.seconds,
        encodes=counted.encodes,
    )


def language_model_shape(config: LanguageModelConfig) -> LanguageModelShape:
    """Sizes of a causal LM, from its config alone.

    Example:
        >>> from frozenprefix.models.configuration import LanguageModelConfig
        >>> language_model_shape(LanguageModelConfig(path=str(lm_folder))).layers
        2
    """
    with torch.device("meta"):
        return LanguageModelShape.from_model(
            AutoModelForCausalLM.from_config(language_model_config(config), dtype=getattr(torch, config.dtype))
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
