"""The training loop: one function over Accelerate, from recipe to best checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict

import torch

from frozenprefix.config.objectives import weight_at
from frozenprefix.config.recipe import Recipe
from frozenprefix.kernels.prepack import prepacked_frozen_weights
from frozenprefix.training.assembly import RunParts
from frozenprefix.training.base_trainer import TrainingResult
from frozenprefix.training.guards import check_finite, check_frozen_text, warn_if_blind
from frozenprefix.training.objectives.weighted_sum import Batch
from frozenprefix.training.schedule import learning_rate_factor
from frozenprefix.training.validation import validation_losses

TEXT_FILE = "text_ability.json"


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

    def _train_mode(self) -> None:
        self.wrapped.train()

    def _stepping(self) -> AbstractContextManager[None]:
        return prepacked_frozen_weights(self.model.language_model)

    # ── the loop ──

    def _step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """One optimizer step over all its micro-batches; each part's loss is the mean over all that it learns from."""
        parts = [self._next_part(batches, number) for number in range(self.settings.gradient_accumulation_steps)]
        shares, targets = self._shares(parts)
        learning_rate, weights = self._set_learning_rate(), self._weights()
        losses = {name: torch.zeros((), device=self.accelerator.device) for name in weights}
        for number, part in enumerate(parts, start=1):
            last = number == len(parts)
            self.accelerator.sync_gradients = last
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
        self._count_step(targets)
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

    # ── validation and saving ──

    def _begin(self) -> None:
        if self.text_before is not None:
            self.tracker.log(0, {"text/perplexity": self.text_before.perplexity})

    def _end(self) -> None:
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

    def _measure(self) -> dict[str, float]:
        """The loss with right and with shuffled images, and what the objectives measure."""
        size = self.settings.images_per_step
        losses = validation_losses(self.model, self.collator, self.validation_groups, size)
        if 3 * self.progress.step > self.total_steps:
            warn_if_blind(self.progress.step, losses)
        return losses | self.objectives.validate(self.collator, self.validation_groups, size)

    def _best_of(self, values: dict[str, float]) -> tuple[str, float]:
        return self.objectives.best_by(values)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """What can be moved, moved; the samples that a batch is made of stay as they are."""
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
