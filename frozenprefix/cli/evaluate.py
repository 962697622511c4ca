"""`frozenprefix evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from frozenprefix.cli.common import (
    Arithmetic,
    Checkpoint,
    Force,
    LanguageModel,
    Precision,
    is_main_process,
    print_table,
    write_json,
)
from frozenprefix.errors import ConfigError


def command(
    checkpoint: Checkpoint,
    task: Annotated[
        str,
        typer.Option(help="caption, vqa, classification, fewshot, grounding, …", show_default=False),
    ],
    data: Annotated[
        str | None, typer.Option(help="Folder of the data; by default the validation data of its recipe.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the folder to take; by default all.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first N images.")] = None,
    beams: Annotated[
        int | None, typer.Option(min=1, help="Beams; 1 is greedy. By default 5 for captions and 1 for answers.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="JSONL file for every prediction; by default in the checkpoint's folder.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over, instead of resuming an evaluation that was killed.")
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of the task: shots=4, metrics=[meteor]."),
    ] = None,
    language_model: LanguageModel = None,
    precision: Precision = Arithmetic.auto,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the whole result to.")] = None,
    force: Force = False,
) -> None:
    """Evaluate a checkpoint, and compare it with no image and with a wrong image.

    With torchrun or accelerate launch the processes share the work.
    """
    from frozenprefix.assets import check_checkpoint
    from frozenprefix.utils import check_output, progress_bar

    check_checkpoint(checkpoint)
    options = _task_options(option or [])
    if out is not None:
        check_output(out, {"task", "metrics", "predictions_sha256"}, force=force)
        if predictions is not None and out.resolve() == predictions.resolve():
            raise ConfigError(f"--predictions: got '{predictions}', which is --out too; give two files")
    from frozenprefix.evaluation import evaluate_checkpoint

    with progress_bar("predicting", enabled=is_main_process()) as update:
        result = evaluate_checkpoint(
            checkpoint,
            task=task,
            data=data,
            split=split,
            limit=limit,
            num_beams=beams,
            predictions=predictions,
            restart=restart,
            force=force,
            progress=update,
            language_model=language_model,
            precision=precision.value,
            **options,
        )
    if is_main_process():
        write_json(out, result)
        _print(result)


def _task_options(items: list[str]) -> dict[str, Any]:
    """`name=value` as the task's keyword, the value read as YAML: shots=4, calibrate=false, labels=[cat, dog]."""
    from frozenprefix.config import read_yaml

    options = {}
    for text in items:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--option: got {text!r}, expected NAME=VALUE")
        options[name] = read_yaml(value, f"--option {text!r}")
    return options


def _print(result: dict[str, Any]) -> None:
    from rich.table import Column

    scores = {"model": result["metrics"], **result.get("baselines", {})}
    intervals = result.get("intervals", {})
    columns: list[str | Column] = [Column("metric", no_wrap=True), *scores]
    if intervals:
        columns.insert(2, Column("95 %", no_wrap=True))
    rows = []
    for metric in result["metrics"]:
        cells = [_figure(values.get(metric)) for values in scores.values()]
        if intervals:
            low_high = intervals.get(metric)
            cells.insert(1, "" if low_high is None else f"{low_high[0]:.4f}–{low_high[1]:.4f}")
        rows.append([metric, *cells])
    print_table(columns, rows, title=f"n = {result['n']}")


def _figure(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
