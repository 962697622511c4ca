"""The training loop: one function over Accelerate, from recipe to best checkpoint."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate.utils import broadcast

from frozenprefix.training import checkpoints
from frozenprefix.training.assembly import RunParts
from frozenprefix.training.guards import check_finite, check_frozen_text, warn_if_blind
from frozenprefix.training.objective_sections import weight_at
from frozenprefix.training.objectives import Batch
from frozenprefix.training.recipe import Recipe
from frozenprefix.training.schedule import learning_rate_factor
from frozenprefix.training.tracking import Tracker
from frozenprefix.training.validation import validation_losses

TEXT_FILE = "text_ability.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """Where the checkpoints are, and how the run ended."""

    output_dir: Path
    best: Path
    steps: int
    targets_seen: int
    seconds: float
    best_value: float | None  # of the best checkpoint, by `best_by`
    best_by: str = "loss"  # what it was chosen by: see `Objectives.best_by`


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


class Trainer(RunParts):
    """One run, from its first step to its last. Use `train`."""

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
            self.best_by,
        )

    # ── the loop ──

    def _loop(self) -> None:
        self.started, first = time.monotonic() - self.progress.seconds, self.progress.step
        task = self.bar.add_task("training", total=self.total_steps, completed=self.progress.step, note="")
        if self.progress.step == 0:
            self._log_text()
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
        if self.progress.step > first:
            self._compare_text()
        self._save_last()

    def _step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """One optimizer step over all its micro-batches; each part's loss is the mean over all that it learns from."""
        parts = [self._next_part(batches, number) for number in range(self.settings.gradient_accumulation_steps)]
        shares, targets = self._shares(parts)
        learning_rate, weights = self._set_learning_rate(), self._weights()
        losses = {name: torch.zeros((), device=self.accelerator.device) for name in weights}
        for number, part in enumerate(parts, start=1):
            last = number == len(parts)
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                found = self.wrapped(part, shares[number - 1])
                # DDP averages gradients over processes; the shares already add up to one
                total = torch.stack([weights[name] * loss for name, loss in found.items()]).sum()
                self.accelerator.backward(total * self.accelerator.num_processes)
            for name, loss in found.items():
                losses[name] += loss.detach()
        norm = float(
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.settings.max_grad_norm or float("inf"))
        )
        values = {name: float(self.accelerator.reduce(loss, "sum")) for name, loss in losses.items()}
        loss_value = sum(weights[name] * value for name, value in values.items())
        # with loss scaling an infinite gradient is how the scale is found: the scaler skips that step by itself
        checked = norm if self.accelerator.scaler is None else 0.0
        check_finite(self.progress.step + 1, loss_value, checked, learning_rate)
        self.optimizer.step()
        ranks = self.model.update_adapters(self.progress.step + 1)  # it reads the gradients
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.targets_seen += targets
        self.progress.seconds = time.monotonic() - self.started
        named = {f"loss/{name}": value for name, value in values.items()} if list(values) != ["lm"] else {}
        figures = {"gradient_norm": norm, "learning_rate": learning_rate, "targets": targets}
        return {"loss": loss_value, **named, **self.objectives.figures, **ranks, **figures}

    def _next_part(self, batches: Iterator[Batch], number: int) -> Batch:
        accumulation, rank = self.settings.gradient_accumulation_steps, self.accelerator.process_index
        batch = to_device(next(batches), self.accelerator.device)
        return self.objectives.prepare(batch, self.progress.step * self.num_parts + rank * accumulation + number)

    def _shares(self, parts: list[Batch]) -> tuple[list[dict[str, float]], int]:
        """What share of the step each micro-batch holds, for each part of the loss; and the targets of the step."""
        counts = [self.objectives.counts(part) for part in parts]
        sums = [sum(count[name] for count in counts) for name in self.objectives.names]
        sums.append(sum(part["packed"].num_targets for part in parts))
        *totals, targets = self.accelerator.reduce(torch.tensor(sums, device=self.accelerator.device), "sum").tolist()
        whole = dict(zip(self.objectives.names, totals, strict=True))
        return [{name: count[name] / whole[name] for name in whole} for count in counts], targets

    def _set_learning_rate(self) -> float:
        step, settings = self.progress.step, self.settings
        rate = settings.learning_rate * learning_rate_factor(
            settings.schedule, step, settings.warmup_steps, self._share_done()
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _weights(self) -> dict[str, float]:
        done = self._share_done()
        return {name: weight_at(self.objectives.weights[name], done) for name in self.objectives.names}

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

    # ── validation and saving ──

    def _log_text(self) -> None:
        if self.text_before is not None:
            self.tracker.log(0, {"text/perplexity": self.text_before.perplexity})

    def _compare_text(self) -> None:
        """Measure the LM on text again, and leave both results in the run's folder."""
        after = self._measure_text(adapted=True)
        if self.text_before is None or after is None:
            return
        unchanged = after.logits_sha256 == self.text_before.logits_sha256
        self.tracker.log(self.progress.step, {"text/perplexity": after.perplexity, "text/unchanged": unchanged})
        if self.accelerator.is_main_process:
            summary = {"text": self.recipe.evaluation.text, "unchanged": unchanged, "before": asdict(self.text_before)}
            (self.output_dir / TEXT_FILE).write_text(json.dumps({**summary, "after": asdict(after)}, indent=2))
        check_frozen_text(unchanged, trained=self.model.trains_text)

    def _validate(self) -> None:
        """Measure the loss with right and with shuffled pictures; keep the best checkpoint."""
        self.progress.validated_step = self.progress.step
        if not self.validation_groups:
            self._save_best()
            return
        size = self.settings.pictures_per_step
        losses = validation_losses(self.model, self.collator, self.validation_groups, size)
        values = losses | self.objectives.validate(self.collator, self.validation_groups, size)
        self.tracker.log(self.progress.step, {f"validation/{name}": value for name, value in values.items()})
        if 3 * self.progress.step > self.total_steps:
            warn_if_blind(self.progress.step, losses)
        if self.progress.step == 0:
            return
        self.best_by, value = self.objectives.best_by(values)
        if self.progress.best_value is None or value < self.progress.best_value:
            self.progress.best_value, self.progress.best_step = value, self.progress.step
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
            self.model.save_adapter_state(folder)
            checkpoints.save_training_state(folder, self.optimizer, self.progress)

        checkpoints.write_folder(self.output_dir / "last", write)

    def _write_model(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        (folder / "recipe.yaml").write_text(self.recipe.to_yaml())
        if self.retriever is not None:
            self.retriever.save(folder)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """What can be moved, moved; the samples that a batch is made of stay as they are."""
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
