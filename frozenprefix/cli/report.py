"""`frozenprefix report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from frozenprefix.cli.common import Force


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Output folders of runs.", show_default=False)],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Of the page; by default the names of the runs.", show_default=False)] = "",
    images: Annotated[int, typer.Option(min=0, help="Images whose captions over time are shown.")] = 8,
    force: Force = False,
) -> None:
    """Write an HTML page about runs: curves, captions over time, best and worst captions, cost, keys that differ.

    It is one file and needs no network. Runs may still be training. Results in RUN, as of
    `evaluate --out RUN/scores.json`, are shown.
    """
    from frozenprefix.utils import check_output

    check_output(out, (), force=force or _is_own(out))
    from frozenprefix.interpret.run_report import read_runs, write_run_report

    path = write_run_report(out, read_runs(runs), title=title, images=images)
    typer.echo(f"wrote {path}: open it in a browser")


def _is_own(path: Path) -> bool:
    """Whether a page was written by this package, which says so near its beginning."""
    return path.is_file() and b"Written by frozenprefix" in path.read_bytes()[:20_000]
