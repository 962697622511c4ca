"""Checks during training: errors stop the run, warnings say what to change."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from frozenprefix.errors import TrainingError

logger = logging.getLogger(__name__)


def check_finite(step: int, loss: float, gradient_norm: float, learning_rate: float) -> None:
    """Check the loss and the gradient norm over all processes, so that all of them stop at the same step.

    Raises:
        TrainingError: for a value that is infinite or not a number.

    Example:
        >>> from frozenprefix.training.guards import check_finite
        >>> check_finite(7, loss=2.0, gradient_norm=float("inf"), learning_rate=1e-3)
        Traceback (most recent call last):
        frozenprefix.errors.TrainingError: step 7: gradient norm is inf at learning rate 1.00e-03; ...
    """
    for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
        if not math.isfinite(value):
            raise TrainingError(
                f"step {step}: {name} is {value} at learning rate {learning_rate:.2e}; lower training.learning_rate or "
                "training.max_grad_norm, or train in fp32. The last checkpoint is unharmed."
            )


def looks_blind(validation_loss: float, shuffled_loss: float, *, margin: float = 0.01) -> bool:
    """Whether the loss with wrong images is as low as with the right ones.

    Example:
        >>> from frozenprefix.training.guards import looks_blind
        >>> looks_blind(3.0, shuffled_loss=3.005), looks_blind(3.0, shuffled_loss=3.2)
        (True, False)
    """
    return shuffled_loss - validation_loss < margin


def warn_if_blind(step: int, losses: Mapping[str, float]) -> None:
    """Warn if the validation losses show that the model ignores the image."""
    if looks_blind(losses["loss"], losses["shuffled_loss"]):
        logger.warning(
            "step %d: validation loss is %.3f with the right image and %.3f with a wrong one: the model does not "
            "look at the image",
            step,
            losses["loss"],
            losses["shuffled_loss"],
        )


def check_frozen_text(unchanged: bool, *, trained: bool) -> None:
    """Check that a language model without trained parameters still computes the same logits on text.

    Raises:
        TrainingError: if its logits changed.
    """
    if not unchanged and not trained:
        raise TrainingError(
            "the language model is frozen, but its logits on evaluation.text have changed: something modified "
            "its weights. The checkpoints do not contain them, and can be loaded with the original model."
        )
