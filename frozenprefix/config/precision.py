"""`precision: auto`: the arithmetic that a run computes in, chosen where it runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.utils import gather_object

from frozenprefix.config.base_recipe import BaseRecipe
from frozenprefix.config.contrastive import ContrastiveRecipe
from frozenprefix.config.loading import load_checkpoint_recipe
from frozenprefix.config.recipe import Recipe
from frozenprefix.kernels.precision import measure_products, native_bfloat16
from frozenprefix.models.contrastive.text_tower import tower_config
from frozenprefix.models.language_model.loading import language_model_config
from frozenprefix.utils.processes import current_processes

logger = logging.getLogger(__name__)
R = TypeVar("R", bound=BaseRecipe)
TYPICAL_SIZES = 768, 3072  # of a model whose config does not say


def resolve_precision(recipe: R, resumed: str | Path | None = None) -> R:
    """The recipe with `training.precision` decided, and with the dtype of frozen parts that follows from it.

    A GPU computes in bf16 if it does so natively, and in fp32 otherwise. On a CPU the faster one is measured, on
    products of the language model's sizes (or the text tower's). All processes take the choice of the first.

    Args:
        resumed: folder of the run's last state; a resumed run keeps the precision that it began with.

    Example:
        >>> resolve_precision(recipe).training.precision
        'fp32'
    """
    if recipe.training.precision != "auto":
        return recipe
    earlier = None if resumed is None else load_checkpoint_recipe(resumed)
    if earlier is not None:
        return recipe.with_precision(earlier.training.precision)
    if torch.accelerator.is_available():
        precision = "bf16" if native_bfloat16() else "fp32"
        logger.info("precision: %s, which this device computes in natively", precision)
        return recipe.with_precision(precision)
    hidden, inner = _feed_forward_sizes(recipe)
    rates = measure_products(hidden, inner)
    current_processes()  # forms the group
    precision = gather_object(["bf16" if rates.faster == torch.bfloat16 else "fp32"])[0]
    message = "precision: %s; products of %d x %d run at %.0f GFLOP/s in fp32 and %.0f in bf16"
    logger.info(message, precision, hidden, inner, rates.float32 / 1e9, rates.bfloat16 / 1e9)
    return recipe.with_precision(precision)


def _feed_forward_sizes(recipe: BaseRecipe) -> tuple[int, int]:
    """Hidden and inner size of the model that takes most of a step."""
    if isinstance(recipe, Recipe):
        config = language_model_config(recipe.model.language_model).get_text_config()
    elif isinstance(recipe, ContrastiveRecipe) and recipe.model.text_tower.source == "transformers":
        tower = recipe.model.text_tower
        config = tower_config(tower).get_text_config()
    else:
        return TYPICAL_SIZES
    hidden = getattr(config, "hidden_size", TYPICAL_SIZES[0])
    named = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner", "d_ff"))
    return hidden, next((size for size in named if size), 4 * hidden)
