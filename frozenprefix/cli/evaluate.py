"""`frozenprefix evaluate`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder.", show_default=False)],
    task: Annotated[
        str, typer.Option(help="caption, vqa, classification, fewshot, retrieval or video.", show_default=False)
    ],
    data: Annotated[
        str | None, typer.Option(help="Folder of the data; the validation data of its recipe when not given.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the folder to take; all when not given.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first N images.")] = None,
    beams: Annotated[
        int | None, typer.Option(min=1, help="Beams; 1 is greedy. 5 for captions and 1 for answers when not given.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="JSONL file for every prediction; beside the checkpoint when not given.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over, instead of going on with an evaluation that was killed.")
    ] = False,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of this task only, such as shots=4.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the whole result to.")] = None,
) -> None:
    """Measure a checkpoint, beside what it scores without the image and with a wrong one.

    Started with torchrun or accelerate launch, the processes share the work.
    """
    from rich.console import Console
    from rich.progress import Progress

    from frozenprefix.evaluation import evaluate_checkpoint

    options: dict[str, Any] = {"predictions": predictions} if predictions is not None else {}
    if restart:
        options["restart"] = True
    options |= _own_options(option or [])
    is_main = int(os.environ.get("RANK", "0")) == 0  # as accelerate and torchrun number processes
    with Progress(console=Console(stderr=True), transient=True, disable=not is_main) as bar:
        line = bar.add_task("predicting", total=None)
        result = evaluate_checkpoint(
            checkpoint,
            task=task,
            data=data,
            split=split,
            limit=limit,
            num_beams=beams,
            progress=lambda done, total: bar.update(line, completed=done, total=total),
            **options,
        )
    if not is_main:
        return
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _show(result)


def _own_options(given: list[str]) -> dict[str, Any]:
    """`name=value` as the task's keyword, the value read as YAML: shots=4, calibrate=false, labels=[cat, dog]."""
    from frozenprefix.config import read_yaml
    from frozenprefix.errors import ConfigError

    options = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--option: got {text!r}, expected NAME=VALUE")
        options[name] = read_yaml(value, f"--option {text!r}")
    return options


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    columns = {"model": result["metrics"], **result.get("baselines", {})}
    intervals = result.get("intervals", {})
    head = [
        Column("metric", no_wrap=True),
        "model",
        *([Column("95 %", no_wrap=True)] if intervals else []),
        *(name for name in columns if name != "model"),
    ]
    table = Table(*head, title=f"n = {result['n']}", title_justify="left")
    for metric in result["metrics"]:
        cells = [_shown(scores.get(metric)) for scores in columns.values()]
        if intervals:
            low_high = intervals.get(metric)
            cells.insert(1, "" if low_high is None else f"{low_high[0]:.4f}–{low_high[1]:.4f}")
        table.add_row(metric, *cells)
    Console().print(table)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
