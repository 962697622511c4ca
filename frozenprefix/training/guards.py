"""Checks during training: errors stop the run, warnings say what to change."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from frozenprefix.data.check import Leak
from frozenprefix.errors import TrainingError

logger = logging.getLogger(__name__)
MOST_NAMED = 20  # sample ids in one message


def find_not_finite(loss: float, gradient_norm: float) -> str | None:
    """Which of both is infinite or not a number; None for a good step.

    Both are over all processes, so that all of them leave out the same steps.

    Example:
        >>> find_not_finite(loss=2.0, gradient_norm=float("inf"))
        'gradient norm is inf'
    """
    for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
        if not math.isfinite(value):
            return f"{name} is {value}"
    return None


def report_bad_step(problem: str, samples: Sequence[str], *, in_a_row: int, allowed: int) -> None:
    """Warn of a step that is left out, and stop a run with too many of them.

    Args:
        problem: step and value, for messages.
        samples: ids of the samples whose loss is not finite; of the whole step where every loss is finite.
        in_a_row: bad steps without a good one in between, this one included.

    Raises:
        TrainingError: `in_a_row` is more than `allowed`.

    Example:
        >>> report_bad_step("step 7: loss is nan", ["red_circle.png"], in_a_row=4, allowed=3)
        Traceback (most recent call last):
        frozenprefix.errors.TrainingError: step 7: loss is nan, and so it was in 4 steps in a row, ...
    """
    named = ", ".join(samples[:MOST_NAMED]) + (f" and {len(samples) - MOST_NAMED} more" * (len(samples) > MOST_NAMED))
    if in_a_row > allowed:
        raise TrainingError(
            f"{problem}, and so it was in {in_a_row} steps in a row, expected at most training.max_bad_steps = "
            f"{allowed} (samples: {named}); lower training.learning_rate or training.max_grad_norm, train in fp32, or "
            "look at these samples. Checkpoints saved before are not affected."
        )
    logger.warning(
        "%s: the step changes nothing (%d in a row, limit %d); samples: %s", problem, in_a_row, allowed, named
    )


def warn_of_leaks(leaks: Sequence[Leak]) -> None:
    """Warn if images for validation are also trained on."""
    if leaks:
        examples = ", ".join(
            leak.image if leak.image == leak.other else f"{leak.image} = {leak.other}" for leak in leaks[:3]
        )
        logger.warning(
            "%d images are in both data.train and data.validation (%s): validation also measures what was memorised; "
            "`frozenprefix data check` lists duplicates",
            len(leaks),
            examples,
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
