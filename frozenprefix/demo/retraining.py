"""Training on corrections: some steps on them, mixed with the images that the checkpoint was trained on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from frozenprefix.config import Recipe, load_checkpoint_recipe, recipe_from_dict
from frozenprefix.demo.corrections import Corrections
from frozenprefix.errors import ConfigError, TrainingError
from frozenprefix.training import read_log
from frozenprefix.utils import write_text_atomic

SHARE = 0.4  # of the images of a step that are corrections; the others are replayed
RATE = 0.3  # of the learning rate that the checkpoint was trained with
VALIDATED = 32  # images of a validation
POLL_SECONDS = 0.5


def correction_recipe(checkpoint: str | Path, corrections: Corrections, output_dir: Path, *, steps: int) -> Recipe:
    """The recipe that goes on from a checkpoint, on its corrections and on the images of its own training.

    What is trained and what is frozen stays as it was; features of images come from the feature cache. Where the
    checkpoint's images are no longer there, its corrections are all that it is trained on; `replays` tells.

    Args:
        output_dir: of the new run.

    Raises:
        ConfigError: there are no corrections, or the checkpoint names no recipe that can go on.

    Example:
        >>> from frozenprefix.training import train
        >>> corrections = Corrections(tmp_path / "corrections")
        >>> corrections.add(image_path, "a cat", "a red circle")
        >>> made = correction_recipe(train(recipe).best, corrections, tmp_path / "corrected", steps=20)
        >>> made.training.max_steps, [source["weight"] for source in made.data.train]
        (20, [0.3, 0.3, 0.4])
    """
    if not len(corrections):
        raise ConfigError(f"corrections: got none in '{corrections.folder}', expected at least one")
    folder = Path(checkpoint).expanduser()
    recipe = load_checkpoint_recipe(folder)
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"checkpoint: '{checkpoint}' holds no recipe.yaml of an image-to-text training to go on with")
    values = recipe.model_dump(mode="json")
    own: dict[str, Any] = {"type": "captions", "path": str(corrections.folder.resolve())}
    replayed = [source for source in values["data"]["train"] if _is_here(source)]
    if replayed:
        weights = [source.get("weight") or 1.0 for source in replayed]
        rest = (1 - SHARE) / sum(weights)
        for source, weight in zip(replayed, weights, strict=True):
            source["weight"] = weight * rest
        own["weight"] = SHARE
    values["data"]["train"] = [*replayed, own]
    kept = [source for source in values["data"]["validation"] if _is_here(source)]
    values["data"]["validation"] = kept
    values["objectives"] = {}
    values["evaluation"]["text"] = None
    values["output_dir"], values["name"] = str(output_dir), f"{recipe.name}-corrected"
    training = values["training"]
    training |= {
        "max_steps": steps,
        "epochs": None,
        "max_minutes": None,
        "init_from": str(folder.resolve()),
        "learning_rate": recipe.training.learning_rate * RATE,
        "learning_rates": {part: rate * RATE for part, rate in recipe.training.learning_rates.items()},
        "warmup_steps": min(5, steps - 1),
        "ema": None,
        "best_by": "loss",
        "log_every": max(1, steps // 20),
        "validate_every": steps,
        "validation_images": VALIDATED,
        "save_every": steps,
        "keep_last": 1,
        "early_stopping_patience": None,
    }
    made = recipe_from_dict(values)
    assert isinstance(made, Recipe)
    return made


def replays(recipe: Recipe) -> bool:
    """Whether images of the first training are among those of a recipe for corrections."""
    return len(recipe.data.train) > 1


def _is_here(source: dict[str, Any]) -> bool:
    path = source.get("path")
    return not isinstance(path, str) or "://" in path or Path(path).expanduser().exists()


class Retraining:
    """A training on corrections in a process of its own, so that the page stays usable, and it can be stopped.

    Args:
        recipe: of `correction_recipe`.

    Attributes:
        checkpoint: folder of the trained weights, once it has ended well.

    Example:
        >>> Retraining(recipe).checkpoint.name
        'last'
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.folder = Path(recipe.output_dir)
        self.checkpoint = self.folder / "last"
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()

    def run(self) -> Iterator[str]:
        """Train; what is going on, one line after the other.

        Raises:
            TrainingError: the training failed, with its last lines, or was stopped.
        """
        write_text_atomic(self.folder / "corrections.yaml", self.recipe.to_yaml())
        command = [sys.executable, "-m", "frozenprefix.cli.main", "train", str(self.folder / "corrections.yaml")]
        output = self.folder / "train.log"
        with output.open("wb") as log:
            self._process = process = subprocess.Popen(
                [*command, "--no-plan", "--resume", "never"], stdout=log, stderr=subprocess.STDOUT, env=_environment()
            )
        try:
            said = ""
            while process.poll() is None:
                line = self._line(output)
                if line != said:
                    yield (said := line)
                time.sleep(POLL_SECONDS)
        finally:
            self._end()
        if self._stopped.is_set():
            raise TrainingError("the training was stopped; the mapper is as it was")
        if process.returncode:
            raise TrainingError(f"the training failed: {_last_error(output)}")
        yield f"trained {self.recipe.training.max_steps} steps"

    def stop(self) -> None:
        """End the training; the iterator of `run` then raises."""
        self._stopped.set()
        self._end()

    def validation_losses(self) -> list[float]:
        """Losses on images of the validation data: before the first step, and after the last; empty without any."""
        losses = [row["validation/loss"] for row in read_log(self.folder) if "validation/loss" in row]
        return [losses[0], losses[-1]] if len(losses) > 1 else []

    def _end(self) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _line(self, output: Path) -> str:
        steps = self.recipe.training.max_steps
        if (self.folder / "log.jsonl").is_file():
            rows = [row for row in read_log(self.folder) if "loss" in row]
            if rows:
                return f"step {rows[-1]['step']} of {steps}, loss {rows[-1]['loss']:.3f}"
        lines = [line for line in _lines(output) if "INFO" in line]
        return lines[-1].partition("INFO")[2].strip()[:120] if lines else "starting"


def _environment() -> dict[str, str]:
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false"}


def _lines(output: Path) -> list[str]:
    return [line for line in output.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _last_error(output: Path) -> str:
    lines = _lines(output)
    told = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    return told[-1] if told else (lines[-1] if lines else f"see {output}")
