"""What a run returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from frozenprefix.training.checkpoints import Progress


@dataclass(frozen=True)
class TrainingResult:
    """Where the checkpoints are, and how the run ended.

    Attributes:
        best: folder of the best checkpoint; best_value: its validation measure; best_by: the name of that measure.
        targets_seen: target texts of all steps; seconds: duration of all steps, resumed ones included.

    Example:
        >>> run = Path("runs/mlp")
        >>> TrainingResult(run, run / "best", steps=6, targets_seen=48, seconds=1.5, best_value=2.1).best_by
        'loss'
    """

    output_dir: Path
    best: Path
    steps: int
    targets_seen: int
    seconds: float
    best_value: float | None
    best_by: str = "loss"

    @classmethod
    def from_progress(cls, output_dir: Path, progress: Progress, *, best_by: str) -> TrainingResult:
        """The result of a run that has come so far."""
        values = progress.step, progress.targets_seen, progress.seconds, progress.best_value
        return cls(output_dir, output_dir / "best", *values, best_by)
