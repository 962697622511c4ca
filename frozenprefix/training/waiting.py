"""How much of a run's time goes into waiting for data."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

logger = logging.getLogger(__name__)
MAX_SHARE = 0.3  # of the time, beyond which a faster supply of data is worth while
Item = TypeVar("Item")


class DataClock:
    """Passes on batches, and knows the share of the last steps' time in which they were waited for.

    Args:
        steps: over how many steps the share is taken.

    Example:
        >>> clock = DataClock(steps=2)
        >>> batches = clock.watch([1, 2])
        >>> for _ in range(2):
        ...     before = time.perf_counter()
        ...     _ = next(batches)
        ...     clock.end_step(time.perf_counter() - before)
        >>> 0 < clock.share <= 1
        True
    """

    def __init__(self, steps: int = 50):
        self._waited = 0.0
        self._steps: deque[tuple[float, float]] = deque(maxlen=steps)
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

    def end_step(self, seconds: float) -> None:
        """Record a step that took `seconds`, waiting included."""
        self._steps.append((self._waited, seconds))
        self._waited = 0.0

    @property
    def share(self) -> float:
        """Share of the time of the last steps, from 0 to 1."""
        seconds = sum(seconds for _, seconds in self._steps)
        return min(1.0, sum(waited for waited, _ in self._steps) / seconds) if seconds else 0.0

    def warn_if_slow(self, step: int, *, workers: int, cached: bool) -> None:
        """Say once that steps wait for data, and what to change.

        Args:
            workers: `data.workers`; cached: whether features come from the feature cache.
        """
        if self._said or len(self._steps) < (self._steps.maxlen or 0) or self.share < MAX_SHARE:
            return
        self._said = True
        if cached:
            advice = "the feature cache should be on a local disk, or in memory"
        else:
            advice = (
                f"raise data.workers (now {workers}), or let data.feature_cache keep the features of frozen encoders"
            )
        logger.warning("step %d: %.0f %% of the time is spent waiting for data: %s", step, 100 * self.share, advice)
