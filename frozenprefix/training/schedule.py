"""Learning rate schedules, and the clock of a run."""

from __future__ import annotations

import math
import time
from typing import Literal

import torch
from accelerate.utils import broadcast

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


class Clock:
    """The time of a run, and what share of a limit it is.

    Args:
        max_minutes: the limit; None for none.
        device: where processes exchange the time.

    Example:
        >>> clock = Clock(max_minutes=10.0, device=torch.device("cpu"))
        >>> clock.start(seconds_before=300.0)
        >>> round(clock.share(), 2)
        0.5
    """

    def __init__(self, max_minutes: float | None, device: torch.device):
        self.max_minutes, self.device = max_minutes, device
        self.start()

    def start(self, seconds_before: float = 0.0) -> None:
        """Count from now on, and from the seconds that a resumed run has taken already."""
        self._started = time.monotonic() - seconds_before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def share(self) -> float:
        """Share of the limit that is over, by the clock of the main process, so that all processes agree."""
        if self.max_minutes is None:
            return 0.0
        return float(broadcast(torch.tensor(self.seconds, device=self.device))) / (60 * self.max_minutes)
