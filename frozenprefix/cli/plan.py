"""`frozenprefix plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from frozenprefix.cli.common import Force, Overrides, RecipeFile, not_nan, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from frozenprefix.planning.plan import Plan


def command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    hardware: Annotated[str, typer.Option(metavar="NAME,…", help="Machines to plan for.")] = "h100,a100,rtx4090,cpu",
    calibrate: Annotated[
        float, typer.Option(min=0, callback=not_nan, help="Seconds of real steps on this machine; 0 for none.")
    ] = 4.0,
    out: Annotated[Path | None, typer.Option("--json", help="JSON file to write all figures to.")] = None,
    force: Force = False,
) -> None:
    """Estimate the cost of a recipe: parameters, memory, cache, and time here and on other machines."""
    from frozenprefix.config import load_recipe
    from frozenprefix.utils import check_output, progress_bar

    if out is not None:
        check_output(out, {"parameters", "memory", "machines"}, force=force, option="--json")
    loaded = load_recipe(recipe, overrides or [])  # first: the rest takes seconds to import
    from rich.console import Console

    from frozenprefix.planning.plan import plan

    names = [name.strip() for name in hardware.split(",") if name.strip()]
    with progress_bar("planning"):
        result = plan(loaded, names, calibrate=calibrate)
    write_json(out, result.to_dict())
    console = Console()
    for table in (_parameters(result), _memory(result), _step(result), _machines(result), _scale(result)):
        console.print(table)


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(columns[0], title_justify="left")
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _parameters(plan: Plan) -> Table:
    table = _table("parameters", "")
    for name, count in plan.parameters.items():
        table.add_row(name, f"{count:,}")
    return table


def _memory(plan: Plan) -> Table:
    table = _table("memory at the peak of a step", "MB")
    for name, size in {**plan.memory, "all": sum(plan.memory.values())}.items():
        table.add_row(name, f"{size / 1e6:,.0f}")
    return table


def _step(plan: Plan) -> Table:
    step, cache = plan.step, plan.cache_bytes
    table = _table("one step", "")
    table.add_row("images, targets", f"{plan.images_per_step}, {step.targets:.0f}")
    table.add_row("tokens learned, read after sharing", f"{step.tokens:.0f}, {step.nodes:.0f}")
    table.add_row("padding", f"{1 - step.nodes / step.cells:.0%}")
    for name, flops in {**plan.flops, "all": sum(plan.flops.values())}.items():
        table.add_row(f"GFLOP, {name}", f"{flops / 1e9:,.1f}")
    table.add_row("GB moved", f"{sum(plan.bytes.values()) / 1e9:,.2f}")
    table.add_row("GFLOP to encode an image", f"{plan.encoder_flops / 1e9:,.2f}")
    table.add_row("feature cache", f"{cache / 1e6:,.1f} MB, {plan.images['all']:,} images")
    table.add_row("images in it already", f"{plan.images['cached']:,}")
    return table


def _machines(plan: Plan) -> Table:
    table = _table("machine", "s/step", "images/s", "encode", "train", "steps", "fits")
    for machine in plan.machines.values():
        table.add_row(
            machine.label,
            f"{machine.seconds_per_step:.3g}",
            f"{machine.encode_per_second:,.0f}",
            duration(machine.seconds_to_encode),
            duration(machine.seconds_to_train),
            f"{machine.steps:,}",
            {None: "", True: "yes", False: "no"}[machine.fits],
        )
    return table


def _scale(plan: Plan) -> Table:
    table = _table("at scale", *(f"{row['images'] / 1e6:,.0f} M images" for row in plan.scale))
    table.add_row("cache", *(f"{row['cache_bytes'] / 1e9:,.0f} GB" for row in plan.scale))
    for name, machine in plan.machines.items():
        figures = [row["machines"][name] for row in plan.scale]
        table.add_row(
            f"{machine.label}: encode, one epoch",
            *(f"{duration(3600 * f['encode_hours'])}, {duration(3600 * f['epoch_hours'])}" for f in figures),
        )
    return table


def duration(seconds: float) -> str:
    """Seconds in a readable unit: 40 s, 12 min, 5.5 h, 31 days."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    if seconds < 360_000:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86_400:,.0f} days"
