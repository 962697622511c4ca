"""Progress of long work: bars on a terminal, and a line in the log every ten seconds elsewhere."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress

logger = logging.getLogger(__name__)
LINE_EVERY = 10.0  # seconds


class Update(Protocol):
    """Reports progress. `total` may come with any call; `note` is shown after the bar."""

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None: ...


class Display(Protocol):
    """Shows what is going on, one thing inside another."""

    def showing(self, description: str) -> AbstractContextManager[Update]:
        """Show a piece of work while the block runs."""
        ...


_display: ContextVar[Display | None] = ContextVar("display", default=None)


@contextmanager
def progress_bar(description: str, *, enabled: bool = True) -> Iterator[Update]:
    """Show a bar on standard error while the block runs, with speed and the time that is left.

    A bar inside another one is drawn below it. Without a terminal a line is logged every `LINE_EVERY` seconds, also
    when there is nothing new.

    Args:
        enabled: False in all processes but one; those that torchrun numbers 1 and above show nothing in any case.

    Example:
        >>> with progress_bar("encoding images") as update:
        ...     for done in range(3):
        ...         update(done + 1, 3)
    """
    display = _display.get()
    with nullcontext(display) if display is not None else _new_display(enabled) as shown:
        token = _display.set(shown)
        try:
            with shown.showing(description) as update:
                yield update
        finally:
            _display.reset(token)


@contextmanager
def _new_display(enabled: bool) -> Iterator[Display]:
    enabled = enabled and os.environ.get("RANK", "0") == "0"
    bars = _new_bars(enabled)
    if not enabled or bars.console.is_terminal:
        # older releases of rich end bars that were never shown with a new line
        with bars if enabled else nullcontext():
            yield _Bars(bars)
        return
    lines, stopped = ProgressLines(), threading.Event()
    thread = threading.Thread(target=_keep_ticking, args=(lines, stopped), daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        stopped.set()
        thread.join()


def _keep_ticking(lines: ProgressLines, stopped: threading.Event) -> None:
    while not stopped.wait(1.0):
        lines.tick()


class _Bars:
    """Bars of rich."""

    def __init__(self, bars: Progress):
        self._bars = bars

    @contextmanager
    def showing(self, description: str) -> Iterator[Update]:
        task = self._bars.add_task(description, total=None, note="")

        def update(done: int, total: int | None = None, note: str = "") -> None:
            self._bars.update(task, completed=done, total=total, note=note)

        try:
            yield update
        finally:
            self._bars.refresh()
            self._bars.remove_task(task)


@dataclass
class _Work:
    description: str
    started: float
    done: int = 0
    first: tuple[int, float] | None = None  # what was done at the first report, and when that was
    total: int | None = None
    note: str = ""

    def line(self, now: float) -> str:
        parts = [f"{now - self.started:.0f} s"]
        if self.first is not None:
            parts = [f"{self.done:,}" + (f" of {self.total:,}" if self.total else ""), *parts]
            before, since = self.first
            if self.done > before and now > since:
                rate = (self.done - before) / (now - since)
                parts.append(f"{rate:.3g}/s")
                parts += [f"{(self.total - self.done) / rate:.0f} s left"] if self.total else []
        return f"{self.description}: {', '.join(parts)}" + (f"  {self.note}" if self.note else "")


@dataclass
class ProgressLines:
    """Progress as lines: one about the innermost work every `LINE_EVERY` seconds, and one when long work is done.

    Args:
        say: takes a line; clock: seconds.

    Example:
        >>> seconds = iter([0.0, 0.0, 5.0, 11.0, 12.0])
        >>> with ProgressLines(print, clock=lambda: next(seconds)).showing("encoding") as update:
        ...     update(10, 100)
        ...     update(70, 100)
        encoding: 70 of 100, 11 s, 10/s, 3 s left
        encoding: done, 12 s
    """

    say: Callable[[str], None] = logger.info
    clock: Callable[[], float] = time.monotonic
    _work: list[_Work] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._last = self.clock()

    @contextmanager
    def showing(self, description: str) -> Iterator[Update]:
        work = _Work(description, self.clock())
        self._work.append(work)
        self.tick(work.started)

        def update(done: int, total: int | None = None, note: str = "") -> None:
            work.done, work.total, work.note = done, total or work.total, note or work.note
            now = self.clock()
            if work.first is None:
                work.first = done, now
            self.tick(now)

        try:
            yield update
        finally:
            self._work.remove(work)
            now = self.clock()
            seconds = now - work.started
            if seconds >= LINE_EVERY:
                self._last = now
                self.say(f"{description}: done, {seconds:.0f} s")

    def tick(self, now: float | None = None) -> None:
        """Say how far the innermost work is, if it was not said within the last `LINE_EVERY` seconds."""
        with self._lock:
            now = self.clock() if now is None else now
            work = self._work[-1:]
            if work and now - self._last >= LINE_EVERY:
                self._last = now
                self.say(work[0].line(now))


def _new_bars(enabled: bool) -> Progress:
    from rich.console import Console  # here: commands that show no bar start faster without it
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed or 0:.1f}/s")

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Speed(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not enabled or not console.is_terminal,
    )
