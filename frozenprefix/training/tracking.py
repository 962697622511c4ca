"""The log of a run: always `log.jsonl`, and through accelerate TensorBoard, Weights & Biases and trackio."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from frozenprefix.config.sections import TrackingSection
from frozenprefix.errors import DataError, TrainingError
from frozenprefix.utils import append_jsonl, read_jsonl, report, write_jsonl, write_text_atomic

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"
PROJECT = "frozenprefix"
# tracker: (module that it needs, extra of this package that installs it)
TRACKERS = {
    "tensorboard": ("torch.utils.tensorboard", "track"),
    "wandb": ("wandb", "wandb"),
    "trackio": ("trackio",) * 2,
}


class Tracker:
    """Writes the numbers of a run. A context manager.

    Args:
        output_dir: the run's folder; created if it does not exist.
        tracking: which trackers to use in addition to `log.jsonl`.
        resume_step: the step that a resumed run continues from: later lines of the log are removed, because the run
            writes them again. 0 starts a new log.
        config: plain data that describes the run, for trackers that show it.
        enabled: False on every process but the main one, where nothing is written.

    Raises:
        TrainingError: when the library of a tracker is not installed, or the log of a resumed run is damaged.

    Example:
        >>> with Tracker(tmp_path) as tracker:
        ...     tracker.log(1, {"loss": 0.5})
        >>> read_log(tmp_path)
        [{'step': 1, 'loss': 0.5}]
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
        self.path, self.enabled = Path(output_dir) / LOG_FILE, enabled
        self.trackers: list[GeneralTracker] = []
        if not enabled:
            return
        rows = _read_rows(self.path) if resume_step and self.path.is_file() else []
        for name in TRACKERS:
            if getattr(tracking, name, False):
                self.trackers.append(_start_tracker(name, self.path.parent, resume_step, dict(config or {})))
        write_jsonl(self.path, [row for row in rows if row["step"] <= resume_step])

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the values of a step. Numbers that are not finite become the words "nan", "inf" and "-inf".

        Other trackers take numbers only; TensorBoard the sample captions too.
        """
        if not self.enabled:
            return
        append_jsonl(self.path, [{"step": step, **{name: _plain(value) for name, value in values.items()}}])
        texts = text_of(values)
        numbers = {name: float(value) for name, value in values.items() if _is_number(value)}
        for tracker in self.trackers:
            # accelerate before 1.14 does not hand the step on to trackio
            (tracker.tracker if tracker.name == "trackio" else tracker).log(numbers, step=step)
            if tracker.name == "tensorboard":
                for name, text in texts.items():
                    tracker.writer.add_text(name, text, step)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self.trackers:
            tracker.finish()


def read_log(output_dir: str | Path) -> list[dict[str, Any]]:
    """Read the `log.jsonl` of a run. A last line that a killed process left unfinished is skipped.

    Raises:
        TrainingError: when there is no log, or another line of it is damaged.

    Example:
        >>> _ = (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.5}')
        >>> [row["loss"] for row in read_log(tmp_path)]
        [2.5]
    """
    path = Path(output_dir) / LOG_FILE
    if not path.is_file():
        raise TrainingError(f"{path}: no such log; is '{output_dir}' the output folder of a run?")
    return _read_rows(path)


def text_of(values: Mapping[str, Any]) -> dict[str, str]:
    """The sample captions among values to log, as Markdown, for trackers that show text.

    Example:
        >>> text_of({"loss": 2.0, "validation/captions": ["a dog"], "validation/caption_images": ["x/1.jpg"]})
        {'validation/captions': '- 1.jpg: a dog'}
    """
    captions, images = values.get("validation/captions"), values.get("validation/caption_images")
    if not captions or not images:
        return {}
    lines = [f"- {Path(image).name}: {caption}" for image, caption in zip(images, captions, strict=True)]
    return {"validation/captions": "\n".join(lines)}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        for number, row in read_jsonl(path):
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise DataError(f"{path}:{number}: got {str(row)[:60]!r}, expected a JSON object with a step")
            rows.append(row)
    except DataError as error:
        lines_before_last = path.read_bytes().rstrip(b"\n").count(b"\n")
        if len(rows) < lines_before_last:
            raise TrainingError(f"{error}; repair or move the file to go on") from error
        report(path, len(rows) + 1, {"cut off in writing": 1}, what="lines")
    return rows


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


def _start_tracker(name: str, output_dir: Path, resume_step: int, config: dict[str, Any]) -> GeneralTracker:
    module, extra = TRACKERS[name]
    try:
        import_module(module)
    except ImportError as error:
        raise TrainingError(
            f"tracking.{name}: got true, but {module} cannot be imported; pip install 'frozenprefix[{extra}]', or set "
            f"tracking.{name}=false"
        ) from error
    tracker: GeneralTracker
    if name == "tensorboard":
        purge = resume_step + 1 if resume_step else None
        tracker = TensorBoardTracker("tensorboard", logging_dir=output_dir, purge_step=purge)
    elif name == "trackio":
        resume = "allow" if resume_step else "never"
        tracker = TrackioTracker(PROJECT, name=output_dir.name, resume=resume, config=config)
    else:
        # The run's id is stored next to the log, so that a resumed run continues the same curves.
        id_file = output_dir / "wandb_run_id"
        if not resume_step or not id_file.is_file():
            write_text_atomic(id_file, uuid.uuid4().hex[:8])
        run_id = id_file.read_text(encoding="utf-8")
        tracker = WandBTracker(
            PROJECT, name=output_dir.name, dir=str(output_dir), id=run_id, resume="allow", config=config
        )
    tracker.start()
    return tracker
