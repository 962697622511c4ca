"""Ends a run whose processes wait for one that is gone, stopped, or stuck while it loads data."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from frozenprefix.errors import StoppedError

logger = logging.getLogger(__name__)
INTERVAL = 2.0  # seconds between two looks
GRACE = 10.0  # seconds for a process to end by itself when another one has
RUNNING, DONE, FAILED = 0.0, 1.0, 2.0
Item = TypeVar("Item")


class Watchdog:
    """A thread in each process that watches the others. A context manager; nothing happens with one process.

    The processes of a run wait for each other in every step, without end if one of them hangs. A backend's own time-out
    is ten minutes or more, and does not always name the process.

    Args:
        seconds: a process that does not answer for so long, or loads a batch or validates for so long while another has
            done so, ends the run: all others say which one it is, and stop. States that were saved before are whole.

    Example:
        >>> with Watchdog(seconds=60) as watchdog:
        ...     list(watchdog.loading([1, 2]))
        [1, 2]
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._since = 0.0  # when what is watched began; 0.0 if nothing is
        self._status = RUNNING
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # of its own: the backend of the run may be NCCL, and its operations are in another thread
            group = dist.new_group(backend="gloo")
            self._thread = threading.Thread(target=self._watch, args=(group,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # a run that is told to stop ends in all processes
        self._status = DONE if kind is None or issubclass(kind, StoppedError) else FAILED
        self._ended.set()
        if self._thread is not None:
            # nobody leaves while another process is still writing, and would miss it
            self._thread.join()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside the block the process does what the others do too, and must not take longer than they by `seconds`."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = 0.0

    def loading(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Pass on batches, each of which is loaded in `watched`."""
        iterator = iter(batches)
        while True:
            try:
                with self.watched():
                    batch = next(iterator)
            except StopIteration:
                return
            yield batch

    def _watch(self, group: dist.ProcessGroup) -> None:
        """Look at all processes until all are done, or one of them is lost."""
        problem = None
        while problem is None:
            self._ended.wait(INTERVAL)
            try:
                dist.monitored_barrier(group, timeout=timedelta(seconds=self.seconds), wait_all_ranks=True)
                since = self._since
                mine = torch.tensor([time.monotonic() - since if since else 0.0, self._status])
                looks = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
                dist.all_gather(looks, mine, group)
            except RuntimeError as error:
                problem = f"a process is lost, or has not answered for {self.seconds:.0f} s: {_first_line(error)}"
                break
            waited, status = torch.stack(looks).unbind(1)
            if bool((status == DONE).all()):
                # waits for the threads of gloo, one of which may else meet the end of the interpreter, and abort
                dist.destroy_process_group(group)
                return
            problem = self._problem(waited.tolist(), status.tolist())
        if not self._ended.wait(GRACE):  # with the others it may have failed itself, and say so
            _end(str(problem))

    def _problem(self, waited: list[float], status: list[float]) -> str | None:
        """What is wrong with a process, from the seconds of what is watched in each, and its status."""
        failed = [rank for rank, value in enumerate(status) if value == FAILED]
        if failed:
            return f"process {', '.join(map(str, failed))} of {len(status)} has failed"
        stuck = [rank for rank, seconds in enumerate(waited) if seconds > self.seconds]
        if stuck and 0.0 in waited:
            named = ", ".join(map(str, stuck))
            return (
                f"process {named} of {len(status)} has been loading a batch or validating for over {self.seconds:.0f} s"
            )
        return None


def _first_line(error: Exception) -> str:
    """What gloo says, which names the processes: "Ranks 1 failed to pass monitoredBarrier in 60000 ms"."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _end(problem: str) -> None:
    """End this process, whose main thread waits inside a library and cannot be told."""
    logger.error("%s; this run ends here: look at that process, and start again to go on from the last state", problem)
    sys.stderr.flush()
    os._exit(1)
