"""`frozenprefix compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from frozenprefix.cli.common import Force, print_table, write_json


def command(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="Result of evaluate --out.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="Another one, of the same data.", show_default=False)],
    draws: Annotated[int, typer.Option(min=100, help="Draws of the bootstrap.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the whole comparison to.")] = None,
    force: Force = False,
) -> None:
    """Tell by how much B is better than A, and whether the difference could be chance."""
    from frozenprefix.utils import check_output

    if out is not None:
        check_output(out, {"task", "images", "metrics", "settings"}, force=force)
    from frozenprefix.evaluation import Evaluation, compare

    result = compare(Evaluation.load(a), Evaluation.load(b), n=draws, seed=seed)
    write_json(out, result)
    _print(result)


def _print(result: dict[str, Any]) -> None:
    from rich.table import Column

    rows = []
    for name, row in result["metrics"].items():
        known = row["p_value"] is not None
        interval = f"{row['low']:+.4f} to {row['high']:+.4f}" if known else ""
        p_value = f"{row['p_value']:.3f}" if known else ""
        rows.append((name, f"{row['a']:.4f}", f"{row['b']:.4f}", f"{row['difference']:+.4f}", interval, p_value))
    title = f"{result['task']}, n = {result['n']}, {result['images']} images"
    print_table([Column("metric", no_wrap=True), "A", "B", "B - A", "95 %", "p"], rows, title)
    for name, (first, second) in result["settings"].items():
        typer.echo(f"{name}: A has {first}, B has {second}")
