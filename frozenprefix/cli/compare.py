"""`frozenprefix compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="Result of evaluate --out.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="Another one, of the same data.", show_default=False)],
    draws: Annotated[int, typer.Option(min=100, help="Draws of the bootstrap.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the whole comparison to.")] = None,
) -> None:
    """Say by how much B is better than A, and whether that could be chance."""
    from frozenprefix.evaluation.comparison import Evaluation, compare

    result = compare(Evaluation.load(a), Evaluation.load(b), n=draws, seed=seed)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _show(result)


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    title = f"{result['task']}, n = {result['n']}, {result['images']} images"
    table = Table(Column("metric", no_wrap=True), "A", "B", "B - A", "95 %", "p", title=title, title_justify="left")
    for name, row in result["metrics"].items():
        known = row["p_value"] is not None
        between = f"{row['low']:+.4f} to {row['high']:+.4f}" if known else ""
        p_value = f"{row['p_value']:.3f}" if known else ""
        table.add_row(name, f"{row['a']:.4f}", f"{row['b']:.4f}", f"{row['difference']:+.4f}", between, p_value)
    console = Console()
    console.print(table)
    for name, (first, second) in result["settings"].items():
        console.print(f"{name}: A has {first}, B has {second}", markup=False, highlight=False)
