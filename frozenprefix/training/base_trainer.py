"""What every training run has, whatever it trains: a folder, a clock, a loop, the best and the last checkpoint."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch.utils.data import DataLoader

from frozenprefix.data.collation import StepDataset
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.data.processes import Processes
from frozenprefix.data.samplers import ImageStream
from frozenprefix.data.samples import ImageGroup, Sample
from frozenprefix.errors import CheckpointError
from frozenprefix.kernels.allocator import keep_freed_memory
from frozenprefix.models.checkpoint import read_checkpoint
from frozenprefix.training import checkpoints
from frozenprefix.training.setup import PreparedImages, prepare_images
from frozenprefix.training.tracking import Tracker, progress_bar

logger = logging.getLogger(__name__)
WINDOW = 50  # steps whose mean loss and speed the bar shows


@dataclass(frozen=True)
class TrainingResult:
    """Where the checkpoints are, and how the run ended."""

    output_dir: Path
    best: Path
    steps: int
    targets_seen: int
    seconds: float
    best_value: float | None  # of the best checkpoint, by `best_by`
    best_by: str = "loss"  # the measure of validation that it was chosen by


class TrainingRun(ABC):
    """One run, from its first step to its last.

    Subclasses build `model`, `processor` and `optimizer`, call `_take_groups`, and say what a step is.
    """

    lower_is_better: ClassVar[bool] = True
    model: Any
    processor: Any
    optimizer: Any
    train_groups: list[ImageGroup]
    validation_groups: list[ImageGroup]
    stream: ImageStream
    total_steps: int

    def __init__(self, recipe: Any, *, mixed_precision: str = "no"):
        self.recipe, self.settings = recipe, recipe.training
        self.accelerator = Accelerator(
            mixed_precision=mixed_precision,
            cpu=not torch.accelerator.is_available(),  # or several processes without a GPU would not know of each other
        )
        keep_freed_memory()
        set_seed(recipe.seed)
        self.output_dir = Path(recipe.output_dir)
        self.best_by = "loss"
        self.progress = checkpoints.Progress(fingerprint=recipe.fingerprint())
        self.bar = progress_bar(self.accelerator.is_main_process)

    def run(self, resume: str) -> TrainingResult:
        """Set up, train, and leave the best checkpoint behind."""
        main = self.accelerator.is_main_process
        if main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        with self.bar:
            self._build()
            self._prepare_data()
            self._prepare_optimizer()
            self._restore(resume)
            step = self.progress.step
            with Tracker(self.output_dir, self.recipe.tracking, resume_step=step, enabled=main) as self.tracker:
                self._loop()
        progress = self.progress
        return TrainingResult(
            self.output_dir,
            self.output_dir / "best",
            progress.step,
            progress.targets_seen,
            progress.seconds,
            progress.best_value,
            self.best_by,
        )

    # ── what a kind of run has to say ──

    @abstractmethod
    def _build(self) -> None:
        """Make `model` and `processor`."""

    @abstractmethod
    def _prepare_data(self) -> None: ...

    @abstractmethod
    def _prepare_optimizer(self) -> None: ...

    @abstractmethod
    def _batches(self) -> Iterator[Any]:
        """Micro-batches of this process, from the step that is due."""

    @abstractmethod
    def _step(self, batches: Iterator[Any]) -> dict[str, float]:
        """One optimizer step; `loss`, `targets` and whatever else there is to log."""

    @abstractmethod
    def _measure(self) -> dict[str, float]:
        """Measures on the validation images."""

    @abstractmethod
    def _best_of(self, values: dict[str, float]) -> tuple[str, float]:
        """The measure that checkpoints are chosen by, and its value."""

    def _train_mode(self) -> None:
        self.model.train()

    def _stepping(self) -> AbstractContextManager[None]:
        """Around all steps and the validations between them."""
        return nullcontext()

    def _begin(self) -> None:  # noqa: B027 - may be left as it is
        """Before the first step of a new run."""

    def _end(self) -> None:  # noqa: B027 - may be left as it is
        """After the last step, unless a resumed run had none to do."""

    # ── set-up ──

    def _encode_images(self, samples: dict[str, list[Sample]]) -> PreparedImages:
        task = self.bar.add_task("encoding images", total=None, note="")
        prepared = prepare_images(
            ImageEncoder.from_model(self.model, self.processor),
            samples,
            self.recipe.data,
            processes=Processes.of(self.accelerator),
            bad_list=self.output_dir / "bad_images.jsonl" if self.accelerator.is_main_process else None,
            progress=lambda done, total: self.bar.update(task, completed=done, total=total),
        )
        self.bar.remove_task(task)
        return prepared

    def _take_groups(self, groups: dict[str, list[ImageGroup]]) -> None:
        """The images of both parts, and with them the order of the steps and their number."""
        settings, self.train_groups = self.settings, groups["train"]
        self.validation_groups = groups.get("validation", [])[: settings.validation_images]
        self.stream = ImageStream(len(self.train_groups), settings.images_per_step, self.recipe.seed)
        images = (settings.epochs or 1) * len(self.train_groups)
        self.total_steps = settings.max_steps or -(-images // settings.images_per_step)

    def _restore(self, resume: str) -> None:
        folder = checkpoints.recover_folder(self.output_dir / "last") if resume == "auto" else Path(resume)
        checkpoints.recover_folder(self.output_dir / "best")
        if resume == "never" or (resume == "auto" and not folder.exists()):
            return
        if not folder.is_dir():
            raise CheckpointError(f"--resume: no folder '{resume}'; expected auto, never or a checkpoint folder")
        self._read_model(folder)
        self.progress = checkpoints.load_training_state(folder, self.optimizer, self.recipe.fingerprint())
        logger.info("resumed from %s at step %d of %d", folder, self.progress.step, self.total_steps)

    def _load_steps(self, collator: Any, *, num_parts: int, parts: Sequence[int], in_memory: bool) -> Iterator[Any]:
        """Collated micro-batches, from the step that is due; by worker processes where images have to be decoded."""
        dataset = StepDataset(
            self.train_groups,
            self.stream,
            collator,
            num_steps=self.total_steps,
            targets_per_image=self.settings.targets_per_image,
            num_parts=num_parts,
            parts=parts,
        )
        remaining = range(self.progress.step * len(parts), len(dataset))
        workers = 0 if in_memory else self.recipe.data.workers
        # a generator of its own: the loader would draw from the global one, and shift what a resumed run draws next
        own = torch.Generator()
        return iter(DataLoader(dataset, batch_size=None, sampler=remaining, num_workers=workers, generator=own))

    # ── the loop ──

    def _loop(self) -> None:
        settings, progress, first = self.settings, self.progress, self.progress.step
        self.started = time.monotonic() - progress.seconds
        task = self.bar.add_task("training", total=self.total_steps, completed=first, note="")
        if first == 0:
            self._begin()
            self._validate()
        batches = self._batches()
        window: list[tuple[float, int, float]] = []
        self._train_mode()
        with self._stepping():
            while progress.step < self.total_steps and not self._out_of_time() and not self._out_of_patience():
                before = time.monotonic()
                values = self._step(batches)
                window.append((values["loss"], int(values["targets"]), time.monotonic() - before))
                window = window[-WINDOW:]
                rate = sum(n for _, n, _ in window) / sum(s for *_, s in window)
                note = f"loss {sum(v for v, *_ in window) / len(window):.3f}  {rate:.1f} targets/s"
                self.bar.update(task, completed=progress.step, note=note)
                if progress.step % settings.log_every == 0:
                    self.tracker.log(progress.step, {**values, "targets_per_s": rate})
                if progress.step % settings.validate_every == 0:
                    self._validate()
                if progress.step % settings.save_every == 0:
                    self._save_last()
        self.bar.update(task, total=progress.step)
        if progress.validated_step != progress.step:
            self._validate()
        if progress.step > first:
            self._end()
        self._save_last()

    def _count_step(self, targets: int) -> None:
        self.progress.step += 1
        self.progress.targets_seen += targets
        self.progress.seconds = time.monotonic() - self.started

    def _share_done(self) -> float:
        return max(self.progress.step / self.total_steps, self._share_of_time())

    def _share_of_time(self) -> float:
        """Share of max_minutes that is over, by the main process's clock: all processes have to act on one value."""
        if self.settings.max_minutes is None:
            return 0.0
        seconds = torch.tensor(time.monotonic() - self.started, device=self.accelerator.device)
        return float(broadcast(seconds)) / (60 * self.settings.max_minutes)

    def _out_of_time(self) -> bool:
        return self._share_of_time() > 1

    def _out_of_patience(self) -> bool:
        patience = self.settings.early_stopping_patience
        return patience is not None and self.progress.bad_validations >= patience

    # ── validation and checkpoints ──

    def _validate(self) -> None:
        """Measure, log, and keep the best checkpoint; without validation images the latest is the best."""
        self.progress.validated_step = self.progress.step
        if not self.validation_groups:
            self._save_best()
            return
        values = self._measure()
        self.tracker.log(self.progress.step, {f"validation/{name}": value for name, value in values.items()})
        if self.progress.step == 0:
            return
        self.best_by, value = self._best_of(values)
        best = self.progress.best_value
        if best is None or (value < best if self.lower_is_better else value > best):
            self.progress.best_value, self.progress.best_step = value, self.progress.step
            self.progress.bad_validations = 0
            self._save_best()
        else:
            self.progress.bad_validations += 1

    def _save_best(self) -> None:
        if self.accelerator.is_main_process:
            checkpoints.write_folder(self.output_dir / "best", self._write_model)

    def _save_last(self) -> None:
        if self.accelerator.is_main_process:
            checkpoints.write_folder(self.output_dir / "last", self._write_state)

    def _read_model(self, folder: Path) -> None:
        self.model.load_trainable(read_checkpoint(folder), source=str(folder))

    def _write_model(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        (folder / "recipe.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")

    def _write_state(self, folder: Path) -> None:
        self._write_model(folder)
        checkpoints.save_training_state(folder, self.optimizer, self.progress)
