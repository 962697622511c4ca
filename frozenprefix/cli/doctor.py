"""`frozenprefix doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from frozenprefix.cli.common import Force, write_json

_MARKS = {True: "ok", False: "--", None: "  "}


def command(
    network: Annotated[
        bool, typer.Option("--network/--no-network", help="Ask the Hub and the package index, for at most 3 s.")
    ] = True,
    out: Annotated[Path | None, typer.Option("--json", help="JSON file to write all facts to, for a report.")] = None,
    force: Force = False,
) -> None:
    """Say what is here: versions, devices, the faster precision, extras and what they are for, the network.

    Nothing of it is an error: the exit code is 0.
    """
    from frozenprefix.utils import check_output, progress_bar

    if out is not None:
        check_output(out, {"versions", "devices", "precision"}, force=force, option="--json")
    with progress_bar("looking around"):
        from frozenprefix.planning.environment import diagnose

        sections = diagnose(network=network)
    write_json(out, {name: [fact._asdict() for fact in facts] for name, facts in sections.items()})
    for name, facts in sections.items():
        typer.secho(name, bold=True)
        width = max(len(fact.name) for fact in facts)
        for fact in facts:
            typer.echo(f"  {_MARKS[fact.ok]} {fact.name:<{width}}  {fact.value}")
