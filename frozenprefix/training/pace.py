"""How fast a run goes: loss, targets per second, and how much of the time goes into waiting for data."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

logger = logging.getLogger(__name__)
MAX_SHARE = 0.3  # of the time, beyond which a faster supply of data is worth while
Item = TypeVar("Item")


class _Step(NamedTuple):
    loss: float
    targets: float
    seconds: float
    waited: float


class Pace:
    """Means over the last steps. Passes on their batches, to know how long they were waited for.

    Args:
        steps: over how many steps means are taken.

    Example:
        >>> pace = Pace(steps=2)
        >>> for batch in pace.watch([1, 2, 3]):
        ...     pace.end_step(loss=float(batch), targets=10, seconds=0.5)
        >>> pace.loss, pace.targets_per_second, pace.wait_share < 0.5
        (2.5, 20.0, True)
    """

    def __init__(self, steps: int = 50):
        self._waited = 0.0  # in the step that is going on
        self._steps: deque[_Step] = deque(maxlen=steps)
        self._said = False

    def watch(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches; the time of each `next` counts as waiting."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - before
            yield batch

    def end_step(self, loss: float, targets: float, seconds: float) -> None:
        """Record a step that took `seconds`, waiting included."""
        self._steps.append(_Step(loss, targets, seconds, self._waited))
        self._waited = 0.0

    @property
    def loss(self) -> float:
        """Mean loss of the last steps."""
        return sum(step.loss for step in self._steps) / len(self._steps)

    @property
    def targets_per_second(self) -> float:
        return sum(step.targets for step in self._steps) / self._seconds

    @property
    def wait_share(self) -> float:
        """Share of the time in which data was waited for, from 0 to 1."""
        return min(1.0, sum(step.waited for step in self._steps) / self._seconds) if self._seconds else 0.0

    @property
    def _seconds(self) -> float:
        return sum(step.seconds for step in self._steps)

    def warn_if_waiting(self, step: int, *, workers: int, cached: bool) -> None:
        """Say once that steps wait for data, and what to change.

        Args:
            workers: `data.workers`; cached: whether features come from the feature cache.
        """
        if self._said or len(self._steps) < (self._steps.maxlen or 0) or self.wait_share < MAX_SHARE:
            return
        self._said = True
        if cached:
            advice = "the feature cache should be on a local disk, or in memory"
        else:
            advice = (
                f"raise data.workers (now {workers}), or let data.feature_cache keep the features of frozen encoders"
            )
        share = 100 * self.wait_share
        logger.warning("step %d: %.0f %% of the time is spent waiting for data: %s", step, share, advice)
