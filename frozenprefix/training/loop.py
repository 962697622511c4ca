"""The training loop: one function over Accelerate, from recipe to best checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.data import DataLoader

from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.collation import Collator, StepDataset
from frozenprefix.data.samplers import PictureStream
from frozenprefix.data.samples import PictureGroup
from frozenprefix.errors import CheckpointError, ConfigError, DataError
from frozenprefix.models.freezing import count_parameters
from frozenprefix.models.language_model import check_packable
from frozenprefix.training import checkpoints
from frozenprefix.training.guards import check_finite, looks_blind
from frozenprefix.training.recipe import Recipe
from frozenprefix.training.schedule import learning_rate_factor
from frozenprefix.training.setup import PictureEncoder, Processes, build_model, load_parts, prepare_pictures
from frozenprefix.training.tracking import Tracker
from frozenprefix.training.validation import validation_losses

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """Where the checkpoints are, and how the run ended."""

    output_dir: Path
    best: Path
    steps: int
    targets_seen: int
    seconds: float
    best_value: float | None


def train(recipe: Recipe, *, resume: str = "auto") -> TrainingResult:
    """Train the mapper of a recipe.

    Args:
        recipe: the whole experiment.
        resume: "auto" goes on from `output_dir/last` when it is there, "never" starts anew, and a path goes on from
            that folder.

    Returns:
        The result, with the best checkpoint in `output_dir/best`.

    Raises:
        FrozenPrefixError: for bad data, a checkpoint of another recipe, or a loss that is not finite.
    """
    return Trainer(recipe).run(resume)


class Trainer:
    """Holds the parts of one run. Use `train`."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.settings = recipe, recipe.training
        on_cpu = not torch.accelerator.is_available()
        if self.settings.precision == "fp16" and on_cpu:
            raise ConfigError("training.precision: fp16 needs a GPU; use bf16 or fp32 on the CPU")
        self.accelerator = Accelerator(
            mixed_precision="fp16" if self.settings.precision == "fp16" else "no",
            cpu=on_cpu,  # or several processes without a GPU would not know of each other
        )
        set_seed(recipe.seed)
        self.output_dir = Path(recipe.output_dir)
        self.progress = checkpoints.Progress(fingerprint=recipe.fingerprint())
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            disable=not self.accelerator.is_main_process,
        )

    def run(self, resume: str) -> TrainingResult:
        """Set up, train, and leave the best checkpoint behind."""
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        with self.bar:
            self._build()
            self._prepare_data()
            self._prepare_optimizer()
            self._restore(resume)
            self.tracker = Tracker(
                self.output_dir,
                self.recipe.tracking,
                resume_step=self.progress.step,
                enabled=self.accelerator.is_main_process,
            )
            try:
                self._loop()
            finally:
                self.tracker.close()
        return TrainingResult(
            self.output_dir,
            self.output_dir / "best",
            self.progress.step,
            self.progress.targets_seen,
            self.progress.seconds,
            self.progress.best_value,
        )

    # ── set-up ──

    def _build(self) -> None:
        self.model, self.processor = build_model(self.recipe)
        self.model.to(self.accelerator.device)
        refusal = check_packable(self.model.language_model) if self.settings.packing != "none" else None
        if refusal:
            raise ConfigError(f"training.packing: {refusal}")
        logger.info("%s", count_parameters(self.model))

    def _prepare_data(self) -> None:
        task = self.bar.add_task("encoding pictures", total=None, note="")
        prepared = prepare_pictures(
            PictureEncoder.of(self.model, self.processor),
            load_parts(self.recipe.data),
            self.recipe.data,
            processes=Processes.of(self.accelerator),
            bad_list=self.output_dir / "bad_pictures.jsonl" if self.accelerator.is_main_process else None,
            progress=lambda done, total: self.bar.update(task, completed=done, total=total),
        )
        self.bar.remove_task(task)
        self._use_data(prepared.groups, prepared.features)

    def _use_data(self, groups: dict[str, list[PictureGroup]], features: FeatureCache | None) -> None:
        self.train_groups = groups["train"]
        if not self.train_groups:
            raise DataError("data.train: not one picture can be read; bad_pictures.jsonl in the output folder says why")
        self.validation_groups = groups.get("validation", [])[: self.settings.validation_pictures]
        self.collator = Collator(
            self.processor,
            features,
            packing=self.settings.packing,
            tokens_per_row=self.settings.tokens_per_row,
            max_target_tokens=self.settings.max_target_tokens,
        )
        per_step = self.settings.pictures_per_step
        self.num_parts = self.settings.gradient_accumulation_steps * self.accelerator.num_processes
        if per_step % self.num_parts:
            raise ConfigError(
                f"training.pictures_per_step must be a multiple of gradient_accumulation_steps x processes = "
                f"{self.num_parts}, got {per_step}"
            )
        self.stream = PictureStream(len(self.train_groups), per_step, self.recipe.seed)
        self.total_steps = self.settings.max_steps or -(
            -(self.settings.epochs or 1) * len(self.train_groups) // per_step
        )

    def _prepare_optimizer(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained,
            lr=self.settings.learning_rate,
            betas=self.settings.betas,
            weight_decay=self.settings.weight_decay,
            fused=True,  # one pass over the weights in place of ten
        )
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)

    def _restore(self, resume: str) -> None:
        folder = checkpoints.recover_folder(self.output_dir / "last") if resume == "auto" else Path(resume)
        checkpoints.recover_folder(self.output_dir / "best")
        if resume == "never" or (resume == "auto" and not folder.exists()):
            return
        if not folder.is_dir():
            raise CheckpointError(f"--resume: no folder '{resume}'; expected auto, never or a checkpoint folder")
        self.model.load_trainable(checkpoints.load_weights(folder), source=str(folder))
        self.progress = checkpoints.load_training_state(folder, self.optimizer, self.recipe.fingerprint())
        logger.info("resumed from %s at step %d of %d", folder, self.progress.step, self.total_steps)

    # ── the loop ──

    def _loop(self) -> None:
        self.started = time.monotonic() - self.progress.seconds
        task = self.bar.add_task("training", total=self.total_steps, completed=self.progress.step, note="")
        if self.progress.step == 0:
            self._validate()
        batches = self._batches()
        window: list[tuple[float, int, float]] = []
        self.wrapped.train()
        while self.progress.step < self.total_steps and not self._out_of_time() and not self._out_of_patience():
            before = time.monotonic()
            values = self._step(batches)
            window.append((values["loss"], int(values["targets"]), time.monotonic() - before))
            window = window[-50:]
            rate = sum(n for _, n, _ in window) / sum(s for *_, s in window)
            note = f"loss {sum(v for v, *_ in window) / len(window):.3f}  {rate:.1f} targets/s"
            self.bar.update(task, completed=self.progress.step, note=note)
            step = self.progress.step
            if step % self.settings.log_every == 0:
                self.tracker.log(step, {**values, "targets_per_s": rate})
            if step % self.settings.validate_every == 0:
                self._validate()
            if step % self.settings.save_every == 0:
                self._save_last()
        self.bar.update(task, total=self.progress.step)
        if self.progress.validated_step != self.progress.step:
            self._validate()
        self._save_last()

    def _batches(self) -> Iterator[dict[str, Any]]:
        accumulation, rank = self.settings.gradient_accumulation_steps, self.accelerator.process_index
        dataset = StepDataset(
            self.train_groups,
            self.stream,
            self.collator,
            num_steps=self.total_steps,
            targets_per_picture=self.settings.targets_per_picture,
            num_parts=self.num_parts,
            parts=range(rank * accumulation, (rank + 1) * accumulation),
        )
        remaining = range(self.progress.step * accumulation, len(dataset))
        workers = 0 if self.collator.features is not None else self.recipe.data.workers
        # a generator of its own: the loader would draw from the global one, and shift what a resumed run draws next
        own = torch.Generator()
        return iter(DataLoader(dataset, batch_size=None, sampler=remaining, num_workers=workers, generator=own))

    def _step(self, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
        """One optimizer step over all its micro-batches; the loss is the mean over all their trained tokens."""
        parts = [
            to_device(next(batches), self.accelerator.device) for _ in range(self.settings.gradient_accumulation_steps)
        ]
        counts = torch.tensor([sum(p["packed"].num_tokens for p in parts), sum(p["packed"].num_targets for p in parts)])
        tokens, targets = self.accelerator.reduce(counts.to(self.accelerator.device), "sum").tolist()
        learning_rate = self._set_learning_rate()
        loss = torch.zeros((), device=self.accelerator.device)
        for number, part in enumerate(parts, start=1):
            share = part["packed"].num_tokens / tokens
            last = number == len(parts)
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                part_loss = self.wrapped(**part).loss * share
                # DDP averages gradients over processes; the shares already add up to one
                self.accelerator.backward(part_loss * self.accelerator.num_processes)
            loss += part_loss.detach()
        norm = float(
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.settings.max_grad_norm or float("inf"))
        )
        loss_value = float(self.accelerator.reduce(loss, "sum"))
        # with loss scaling an infinite gradient is how the scale is found: the scaler skips that step by itself
        checked = norm if self.accelerator.scaler is None else 0.0
        check_finite(self.progress.step + 1, loss_value, checked, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.targets_seen += targets
        self.progress.seconds = time.monotonic() - self.started
        return {"loss": loss_value, "gradient_norm": norm, "learning_rate": learning_rate, "targets": targets}

    def _set_learning_rate(self) -> float:
        step, settings = self.progress.step, self.settings
        done = max(step / self.total_steps, self._share_of_time())
        rate = settings.learning_rate * learning_rate_factor(settings.schedule, step, settings.warmup_steps, done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

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

    # ── validation and saving ──

    def _validate(self) -> None:
        """Measure the loss with right and with shuffled pictures; keep the best checkpoint."""
        self.progress.validated_step = self.progress.step
        if not self.validation_groups:
            self._save_best()
            return
        with torch.no_grad():
            losses = validation_losses(
                self.model, self.collator, self.validation_groups, self.settings.pictures_per_step
            )
        self.tracker.log(self.progress.step, {f"validation/{name}": value for name, value in losses.items()})
        if 3 * self.progress.step > self.total_steps and looks_blind(losses["loss"], losses["shuffled_loss"]):
            logger.warning(
                "step %d: validation loss is %.3f with the right picture and %.3f with a wrong one: the model does not "
                "look at the picture",
                self.progress.step,
                losses["loss"],
                losses["shuffled_loss"],
            )
        if self.progress.step == 0:
            return
        if self.progress.best_value is None or losses["loss"] < self.progress.best_value:
            self.progress.best_value, self.progress.best_step = losses["loss"], self.progress.step
            self.progress.bad_validations = 0
            self._save_best()
        else:
            self.progress.bad_validations += 1

    def _save_best(self) -> None:
        if self.accelerator.is_main_process:
            checkpoints.write_folder(self.output_dir / "best", self._write_model)

    def _save_last(self) -> None:
        if not self.accelerator.is_main_process:
            return

        def write(folder: Path) -> None:
            self._write_model(folder)
            checkpoints.save_training_state(folder, self.optimizer, self.progress)

        checkpoints.write_folder(self.output_dir / "last", write)

    def _write_model(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        (folder / "recipe.yaml").write_text(self.recipe.to_yaml())


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) for name, value in batch.items()}
