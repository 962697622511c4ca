"""Figures of a run: always as JSON lines, on request to TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from frozenprefix.config.sections import TrackingSection
from frozenprefix.errors import TrainingError

log = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"


class Tracker:
    """Writes the figures of a run.

    Args:
        output_dir: the run's folder; made when it is not there.
        tracking: which trackers are wanted beside `log.jsonl`.
        resume_step: the step that a resumed run goes on from: later lines of the log, which it will write again, are
            dropped. 0 starts a new log.
        config: plain data that describes the run, for trackers that show it.
        enabled: False on every process but the main one, where nothing is written.

    Raises:
        TrainingError: when the library of a wanted tracker is not installed, or the log of a resumed run is damaged.
    """

    def __init__(
        self,
        output_dir: str | Path,
        tracking: TrackingSection | None = None,
        *,
        resume_step: int = 0,
        config: Mapping[str, Any] | None = None,
        enabled: bool = True,
    ):
        self.enabled = enabled
        self._log: Any = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        tracking = tracking or TrackingSection()
        output_dir = Path(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        if tracking.tensorboard:
            self._tensorboard = _open_tensorboard(output_dir, resume_step)
        if tracking.wandb:
            self._wandb = _open_wandb(output_dir, resume_step, dict(config or {}))
        path = output_dir / LOG_FILE
        _replace(path, _lines_until(path, resume_step) if resume_step else [])
        self._log = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the values of a step. Numbers that are not finite become the words "nan", "inf" and "-inf"."""
        if not self.enabled:
            return
        if self._log is None:
            raise TrainingError("the tracker is closed, nothing can be logged any more")
        row = {"step": step, **{name: _plain(value) for name, value in values.items()}}
        self._log.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")
        self._log.flush()
        numbers = {name: float(value) for name, value in values.items() if _is_number(value)}
        if self._tensorboard is not None:
            for name, number in numbers.items():
                self._tensorboard.add_scalar(name, number, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """Close every tracker; a second call does nothing."""
        if self._log is not None:
            self._log.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._log = self._tensorboard = self._wandb = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_log(output_dir: str | Path) -> list[dict[str, Any]]:
    """Read a run's `log.jsonl`. A last line that was cut off in writing is left out.

    Raises:
        TrainingError: when there is no log, or another line of it is damaged.
    """
    path = Path(output_dir) / LOG_FILE
    if not path.is_file():
        raise TrainingError(f"{path}: no log there; is '{output_dir}' the folder of a run?")
    return _parse(path)


def _parse(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no step in it")
        except ValueError as error:
            if number == len(lines):
                log.warning("%s:%d: the last line was cut off in writing, it is left out", path, number)
                break
            raise TrainingError(
                f"{path}:{number}: got {line[:60]!r}, expected a JSON object with a step ({error}); "
                "repair or move the file to go on"
            ) from error
        rows.append(row)
    return rows


def _lines_until(path: Path, step: int) -> list[str]:
    rows = _parse(path) if path.is_file() else []
    return [json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row["step"] <= step]


def _replace(path: Path, lines: list[str]) -> None:
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text("".join(lines), encoding="utf-8")
    os.replace(draft, path)


def _is_number(value: Any) -> bool:
    return not isinstance(value, (bool, str, bytes)) and hasattr(value, "__float__")


def _plain(value: Any) -> Any:
    """A JSON value; numbers of numpy and torch become Python's."""
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if _is_number(value):
        number = float(value)
        return number if math.isfinite(number) else str(number)
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    raise TrainingError(f"log value: got {type(value).__name__}, expected a number, text, list or dict of them")


def _open_tensorboard(output_dir: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError(
            "tracking.tensorboard: got true, but TensorBoard is not installed; "
            "pip install 'frozenprefix[track]', or set tracking.tensorboard=false"
        ) from error
    purge = resume_step + 1 if resume_step else None
    return SummaryWriter(str(output_dir / "tensorboard"), purge_step=purge)


def _open_wandb(output_dir: Path, resume_step: int, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise TrainingError(
            "tracking.wandb: got true, but Weights & Biases is not installed; "
            "pip install 'frozenprefix[wandb]', or set tracking.wandb=false"
        ) from error
    # The run's id lies beside the log, so that a resumed run goes on in the same curves.
    id_file = output_dir / "wandb_run_id"
    if not resume_step or not id_file.is_file():
        id_file.write_text(wandb.util.generate_id(), encoding="utf-8")
    return wandb.init(
        project="frozenprefix",
        name=output_dir.name,
        dir=str(output_dir),
        id=id_file.read_text(encoding="utf-8"),
        resume="allow",
        config=config,
    )


def progress_bar(shown: bool) -> Progress:
    """The bar of a run, with a `note` behind every task; nothing where it is not `shown`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        disable=not shown,
    )
