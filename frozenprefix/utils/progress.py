"""Progress of long work, as a bar on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress

_bars: ContextVar[Progress | None] = ContextVar("bars", default=None)


class Update(Protocol):
    """Reports progress. `total` may come with any call; `note` is shown after the bar."""

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None: ...


@contextmanager
def progress_bar(description: str, *, enabled: bool = True) -> Iterator[Update]:
    """Show a bar on standard error while the block runs, with speed and the time that is left.

    A bar inside another one is drawn below it. Without a terminal nothing is shown.

    Args:
        enabled: False in all processes but one.

    Example:
        >>> with progress_bar("encoding images") as update:
        ...     for done in range(3):
        ...         update(done + 1, 3)
    """
    bars = _bars.get()
    if bars is None:
        bars = _new_bars(enabled)
        token = _bars.set(bars)
        try:
            with bars, progress_bar(description) as update:
                yield update
        finally:
            _bars.reset(token)
        return
    task = bars.add_task(description, total=None, note="")

    def update_task(done: int, total: int | None = None, note: str = "") -> None:
        bars.update(task, completed=done, total=total, note=note)

    try:
        yield update_task
    finally:
        bars.refresh()
        bars.remove_task(task)


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
