"""Ends a run whose processes wait for one that is gone, stopped, or stuck while it loads data."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)
INTERVAL = 2.0  # seconds between two looks
Item = TypeVar("Item")


class Watchdog:
    """A thread in each process that watches the others. A context manager; nothing happens with one process.

    The processes of a run wait for each other in every step, without end if one of them hangs. A backend's own time-out
    is ten minutes or more, and does not always name the process.

    Args:
        seconds: a process that does not answer for so long, or loads a batch for so long while another has its own,
            ends the run: all others say which one it is, and stop. States that were saved before are whole.

    Example:
        >>> with Watchdog(seconds=60) as watchdog:
        ...     list(watchdog.loading([1, 2]))
        [1, 2]
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._since = 0.0  # when the process began to load the present batch; 0.0 while it does something else
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # of its own: the backend of the run may be NCCL, and its operations are in another thread
            group = dist.new_group(backend="gloo")
            self._thread = threading.Thread(target=self._watch, args=(group,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._done.set()
        if self._thread is not None and kind is None:
            self._thread.join()

    def loading(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Pass on batches, noting while one is waited for."""
        iterator = iter(batches)
        while True:
            self._since = time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self._since = 0.0
            yield batch

    def _watch(self, group: dist.ProcessGroup) -> None:
        while True:
            # before the wait: all processes leave after the same look
            done = self._done.wait(INTERVAL)
            try:
                dist.monitored_barrier(group, timeout=timedelta(seconds=self.seconds), wait_all_ranks=True)
                since = self._since
                mine = torch.tensor([time.monotonic() - since if since else 0.0, float(done)])
                looks = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
                dist.all_gather(looks, mine, group)
            except RuntimeError as error:
                if not self._done.is_set():
                    _end(f"a process has not answered for {self.seconds:.0f} s: {_first_line(error)}")
                return
            waited, finished = torch.stack(looks).unbind(1)
            if finished.any():
                return
            stuck = [rank for rank, seconds in enumerate(waited.tolist()) if seconds > self.seconds]
            if stuck and (waited == 0).any():
                named = ", ".join(map(str, stuck))
                _end(f"process {named} of {len(looks)} has been loading a batch for over {self.seconds:.0f} s")


def _first_line(error: Exception) -> str:
    """What gloo says, which names the processes: "Ranks 1 failed to pass monitoredBarrier in 60000 ms"."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _end(problem: str) -> None:
    """End this process, whose main thread waits inside a library and cannot be told."""
    logger.error("%s; this run ends here: look at that process, and start again to go on from the last state", problem)
    sys.stderr.flush()
    os._exit(1)
