"""`frozenprefix evaluate`."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer


class Task(str, Enum):
    """What a checkpoint is evaluated on."""

    caption = "caption"
    vqa = "vqa"


def command(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder.", show_default=False)],
    task: Annotated[Task, typer.Option(help="What to evaluate.", show_default=False)],
    data: Annotated[str, typer.Option(help="Folder of the data.", show_default=False)],
    split: Annotated[str | None, typer.Option(help="Split to take; all when not given.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first N pictures.")] = None,
    beams: Annotated[
        int | None, typer.Option(min=1, help="Beams; 1 is greedy. 5 for captions and 1 for answers when not given.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the whole result to.")] = None,
) -> None:
    """Measure a checkpoint, beside what it scores without the picture and with a wrong one."""
    from rich.console import Console
    from rich.progress import Progress

    from frozenprefix.evaluation import evaluate_checkpoint

    with Progress(console=Console(stderr=True), transient=True) as bar:
        line = bar.add_task("predicting", total=None)
        result = evaluate_checkpoint(
            checkpoint,
            task=task.value,
            data=data,
            split=split,
            limit=limit,
            num_beams=beams,
            progress=lambda done, total: bar.update(line, completed=done, total=total),
        )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _show(result)


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = {"model": result["metrics"], **result.get("baselines", {})}
    table = Table("metric", *columns, title=f"n = {result['n']}", title_justify="left")
    for metric in result["metrics"]:
        table.add_row(metric, *(_shown(scores.get(metric)) for scores in columns.values()))
    Console().print(table)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
