"""Learning rate schedules."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate_factor(schedule: Schedule, step: int, warmup_steps: int, progress: float) -> float:
    """Share of the peak learning rate to use.

    Args:
        step: optimizer steps done so far; the first `warmup_steps` rise linearly.
        progress: share of the run that is over, 0 to 1.

    Example:
        >>> learning_rate_factor("linear", step=75, warmup_steps=10, progress=0.75)
        0.25
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    progress = min(1.0, max(0.0, progress))
    if schedule == "cosine":
        return warmup * 0.5 * (1.0 + math.cos(math.pi * progress))
    return warmup * (1.0 - progress) if schedule == "linear" else warmup
