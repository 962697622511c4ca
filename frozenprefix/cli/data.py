"""`frozenprefix data ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from frozenprefix.cli.common import Force, counted, write_json

app = typer.Typer(help="Look at data sets.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `check` a sub-command while it is the only one."""


@app.command()
def check(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of the data.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="JSON file to write the whole report to.")] = None,
    force: Force = False,
) -> None:
    """Read every image once; report broken images and images in two splits. Exit code 1 if there are any.

    The exit code is also 1 for a folder without targets that holds tables which no source reads.
    """
    from frozenprefix.utils import check_output, progress_bar

    if out is not None:
        check_output(out, {"samples", "images", "bad_images", "leaks"}, force=force)
    from frozenprefix.data.check import check_samples
    from frozenprefix.data.sources import detect_sources, load_sources, unread_tables

    samples = load_sources(detect_sources(folder))
    with progress_bar("reading images") as update:
        report = check_samples(samples, progress=update)
    result = report.to_dict()
    write_json(out, result)
    for name, value in result.items():
        for line in _lines(name, value):
            typer.echo(line)
    tables = [] if report.targets else unread_tables(folder)
    for table in tables:
        typer.echo(f"texts that may be in it are not read: {table}")
    if report.bad_images or report.leaks or tables:
        raise typer.Exit(1)


def _lines(name: str, value: Any) -> list[str]:
    label = name.replace("_", " ")
    if isinstance(value, dict):
        return [f"{label}: {counted(value)}"]
    if isinstance(value, list):
        return [f"  {label}: {_example(item)}" for item in value]
    return [f"{label}: {value:.2f}" if isinstance(value, float) else f"{label}: {value}"]


def _example(item: Any) -> str:
    if isinstance(item, dict):
        return f"{item['image']} ({item['split']}) and {item['other']} ({item['other_split']})"
    return str(item)
