"""The package's log on the screen or in a file."""

from __future__ import annotations

import logging


def show_log() -> None:
    """Show the log of this package on standard error, and warnings of others: in colours on a terminal, else one line
    for each message.

    Example:
        >>> show_log()  # doctest: +SKIP
    """
    from rich.console import Console  # here: commands that show no log start faster without it
    from rich.logging import RichHandler

    console = Console(stderr=True)
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, log_time_format="%X")
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%X"))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("frozenprefix").setLevel(logging.INFO)
