"""`precision: auto`: the arithmetic of a run, a caption or an evaluation, chosen on the machine that it runs on."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object

from frozenprefix.config.base_recipe import DTYPES, BaseRecipe
from frozenprefix.config.loading import load_checkpoint_recipe
from frozenprefix.errors import ConfigError
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
    current_processes()  # forms the group
    on_cpu = not torch.accelerator.is_available()
    return recipe.with_precision(gather_object([_faster_precision(recipe.model, on_cpu=on_cpu)])[0])


def inference_precision(config: Any, precision: str = "auto", *, device: str | torch.device = "cpu") -> str:
    """Precision of a checkpoint's frozen parts on this machine, which may differ from that of the training.

    Args:
        config: of the checkpoint, with the place of its language model here; see `checkpoint_config`.
        precision: "fp32", "bf16", "fp16", or "auto", which decides as `resolve_precision` does, in this process alone.
        device: where the model will be.

    Returns:
        A key of `DTYPES`.

    Raises:
        ConfigError: for another precision.

    Example:
        >>> inference_precision(model.config, "bf16")
        'bf16'
    """
    if precision == "auto":
        precision = _faster_precision(config, on_cpu=torch.device(device).type == "cpu")
    if precision not in DTYPES:
        raise ConfigError(f"precision: got {precision!r}, expected auto, {', '.join(DTYPES)}")
    return precision


def _faster_precision(sections: Any, *, on_cpu: bool) -> str:
    """ "bf16" or "fp32", with one line in the log that says why; `sections` names the language model or text tower."""
    if not on_cpu:
        precision = "bf16" if native_bfloat16() else "fp32"
        logger.info("precision: %s, which this device computes in natively", precision)
        return precision
    hidden, inner = _feed_forward_sizes(sections)
    rates = measure_products(hidden, inner)
    precision = "bf16" if rates.faster == torch.bfloat16 else "fp32"
    message = "precision: %s; products of %d x %d run at %.0f GFLOP/s in fp32 and %.0f in bf16, on one core"
    logger.info(message, precision, hidden, inner, rates.float32 / 1e9, rates.bfloat16 / 1e9)
    return precision


def _feed_forward_sizes(sections: Any) -> tuple[int, int]:
    """Hidden and inner size of the model that takes most of the time."""
    language_model, tower = (getattr(sections, name, None) for name in ("language_model", "text_tower"))
    if getattr(sections, "text_config", None) is not None:  # a checkpoint that holds the whole tower
        config: Any = SimpleNamespace(**sections.text_config)
    elif language_model is not None:
        config = language_model_config(language_model).get_text_config()
    elif tower is not None and tower.source == "transformers":
        config = tower_config(tower).get_text_config()
    else:
        return TYPICAL_SIZES
    hidden = getattr(config, "hidden_size", TYPICAL_SIZES[0])
    named = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner", "d_ff"))
    return hidden, next((size for size in named if size), 4 * hidden)
