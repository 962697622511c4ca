"""`frozenprefix data ...`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Look at data sets.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `check` a sub-command while it is the only one."""


@app.command()
def check(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of the data.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="JSON file to write the whole report to.")] = None,
) -> None:
    """Read every image once; report what is broken, and what is in two splits. Exit code 1 when there is any."""
    from rich.console import Console
    from rich.progress import Progress

    from frozenprefix.data.check import check_samples
    from frozenprefix.data.sources import detect_sources, load_sources

    samples = load_sources(detect_sources(folder))
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading images", total=None)
        report = check_samples(samples, progress=lambda done, total: bar.update(task, completed=done, total=total))
    result = report.to_dict()
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, value in result.items():
        for line in _lines(name, value):
            typer.echo(line)
    if report.bad_images or report.leaks:
        raise typer.Exit(1)


def _lines(name: str, value: Any) -> list[str]:
    label = name.replace("_", " ")
    if isinstance(value, dict):
        return [f"{label}: {', '.join(f'{key} {number}' for key, number in value.items()) or 'none'}"]
    if isinstance(value, list):
        return [f"  {label}: {_example(item)}" for item in value]
    return [f"{label}: {value:.2f}" if isinstance(value, float) else f"{label}: {value}"]


def _example(item: Any) -> str:
    if isinstance(item, dict):
        return f"{item['image']} ({item['split']}) and {item['other']} ({item['other_split']})"
    return str(item)
