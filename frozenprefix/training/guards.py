"""Checks that stop a run that cannot come to any good."""

from __future__ import annotations

import math

from frozenprefix.errors import TrainingError


def check_finite(step: int, loss: float, gradient_norm: float, learning_rate: float) -> None:
    """Raise `TrainingError` for a loss or gradient that is not a number.

    The values are those of all processes together, so that all stop at the same step.
    """
    for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
        if not math.isfinite(value):
            raise TrainingError(
                f"step {step}: {name} is {value} at learning rate {learning_rate:.2e}; lower training.learning_rate or "
                "training.max_grad_norm, or train in fp32. The last checkpoint is unharmed."
            )


def looks_blind(validation_loss: float, shuffled_loss: float, *, margin: float = 0.01) -> bool:
    """True when a wrong picture serves the model as well as the right one: it has not learned to look."""
    return shuffled_loss - validation_loss < margin
