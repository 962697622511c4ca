"""Training of a mapper: from a recipe to the best checkpoint."""

from __future__ import annotations

import json
import logging
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from frozenprefix.assets import check_checkpoint
from frozenprefix.config.recipe import Recipe
from frozenprefix.data.augmentation import Augmentation
from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.collation import Collator
from frozenprefix.data.samples import ImageGroup, group_by_images
from frozenprefix.data.streaming.groups import known_groups
from frozenprefix.data.text_only import TextOnlyCollator, TextVectors
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.evaluation.text_ability import TextAbility, read_text, text_ability
from frozenprefix.kernels.prepack import prepacked_frozen_weights
from frozenprefix.models.freezing import count_parameters
from frozenprefix.training.base_trainer import BaseTrainer
from frozenprefix.training.callbacks import Callback
from frozenprefix.training.checkpoints import RandomStates, load_initial
from frozenprefix.training.diagnosis import Measured, show_captions, warn_of_symptoms
from frozenprefix.training.guards import check_frozen_text, find_not_finite
from frozenprefix.training.objectives.base import Batch
from frozenprefix.training.objectives.weighted_sum import WeightedSum
from frozenprefix.training.optimizer import build_optimizer
from frozenprefix.training.result import TrainingResult
from frozenprefix.training.run_folder import with_run_precision
from frozenprefix.training.sampling import CaptionSamples, greedy_captions, greedy_cider_d
from frozenprefix.training.setup import add_similar_captions, build_model, fit_mapper, load_parts, load_validation
from frozenprefix.training.sharding import average_gradients, shard_frozen_layers
from frozenprefix.training.validation import check_can_be_shuffled, validation_losses
from frozenprefix.utils import progress_bar, write_text_atomic
from frozenprefix.utils.random_state import seed_all

logger = logging.getLogger(__name__)
TEXT_FILE = "text_ability.json"


def train(recipe: Recipe, *, resume: str = "auto", callbacks: Sequence[Callback] = ()) -> TrainingResult:
    """Train the mapper of a recipe.

    Args:
        recipe: the whole experiment.
        resume: "auto" continues from the last whole state in `output_dir`, "never" starts a new run, and a path
            continues from that folder.
        callbacks: of transformers' kind, which may end the run; see `Callbacks`.

    Returns:
        The result, with the best checkpoint in `output_dir/best`.

    Raises:
        FrozenPrefixError: for bad data, a checkpoint of another recipe, losses that are not finite, a signal to stop.

    Example:
        >>> result = train(recipe, resume="never")
        >>> result.best.name
        'best'
    """
    return Trainer(with_run_precision(recipe, resume), callbacks=callbacks).run(resume)


class Trainer(BaseTrainer):
    """Trains the mapper, and all other trained parts of a recipe, through the frozen language model.

    Example:
        >>> trainer = Trainer(recipe)
        >>> trainer.setup()
        >>> trainer.step(trainer.batches())["loss"] > 0
        True
    """

    def __init__(self, recipe: Recipe, *, callbacks: Sequence[Callback] = ()):
        half = recipe.training.precision == "fp16"
        if half and not torch.accelerator.is_available():
            raise ConfigError("training.precision: fp16 needs a GPU; use bf16 or fp32 on the CPU")
        super().__init__(
            recipe,
            mixed_precision="fp16" if half else "no",
            accumulation=recipe.training.gradient_accumulation_steps,
            callbacks=callbacks,
        )
        self._first_loss: float | None = None  # of the validation before the first step
        self._norms: deque[float] = deque(maxlen=50)
        self._check_sharding()
        per_step = recipe.training.images_per_step
        if per_step % self.num_parts:
            raise ConfigError(
                f"training.images_per_step: got {per_step}, expected a multiple of gradient_accumulation_steps x "
                f"processes = {self.num_parts}"
            )

    def _check_sharding(self) -> None:
        """What needs a different number of forward passes on each process cannot be sharded."""
        if self.sharding is None:
            return
        if self.settings.precision == "fp16":
            raise ConfigError("training.precision: got fp16 with FSDP2, expected bf16 or fp32")
        if self.recipe.objectives.self_critical is not None:
            raise ConfigError(
                "objectives.self_critical: got FSDP2, under which all processes have to generate equally long; use DDP"
            )

    # ── set-up ──

    def build_model(self) -> None:
        if self.settings.init_from is not None:
            check_checkpoint(self.settings.init_from, field="training.init_from")  # before the parts are loaded
        self.model, self.processor = build_model(self.recipe)
        if self.sharding is not None:
            layers = shard_frozen_layers(self.model.language_model, self.sharding)
            logger.info("FSDP2: %d layers in %d processes", layers, self.accelerator.num_processes)
        self.model.to(self.accelerator.device)
        problem = self.model.lm.packing_problem() if self.settings.packing != "none" else None
        if problem is not None:
            logger.warning("training.packing: %s. This run uses 'none'", problem.partition("; set training.packing")[0])
            self.settings = self.settings.model_copy(update={"packing": "none", "tokens_per_row": None})
            self.recipe = self.recipe.model_copy(update={"training": self.settings})
        logger.info("%s", count_parameters(self.model))
        self.text_before = self._measure_text(adapted=False)
        if self.settings.init_from is not None:
            load_initial(self.model, Path(self.settings.init_from).expanduser())

    def prepare_data(self) -> None:
        mixture = self.load_mixture(without_images=self.model.trains_text)
        if mixture is None:
            samples = load_parts(self.recipe.data, without_images=self.model.trains_text)
        else:
            samples = {"train": mixture.listed, "validation": load_validation(self.recipe.data)}
        if samples.get("validation"):
            check_can_be_shuffled(group_by_images(samples["validation"]))
        # for training on text alone, the training images are never read
        unread = {"train": group_by_images(samples.pop("train"))} if self.recipe.data.text_only else {}
        prepared = self.encode_images(samples)
        self.retriever = add_similar_captions(prepared, self.recipe.data)
        groups, train_features = self.mixed_groups(mixture, prepared)
        if self.recipe.data.augmentation is not None:
            views, image_processor = self.recipe.data.augmentation.views, self.processor.image_processor
            self.augmentation = Augmentation(views, prepared.view_features, image_processor, self.recipe.seed)
        self.use_data({**groups, **unread}, prepared.features, train_features)
        if self.settings.init_from is None:
            fit_mapper(self.model, self.train_groups, None if unread else train_features)

    def use_data(
        self,
        groups: Mapping[str, Sequence[ImageGroup]],
        features: FeatureCache | None,
        train_features: FeatureCache | None,
    ) -> None:
        """Set the images, their features if they are cached, and the collators."""
        if not groups["train"]:
            raise DataError("data.train: not one image can be read; bad_images.jsonl in the output folder says why")
        self.use_groups(groups, features)
        self.collator = Collator(self.processor, features, **self._collation())
        positions = self.model.lm.learned_positions
        self.train_collator = self._training_collator(train_features, positions)
        self.train_collator.check_targets(known_groups(self.train_groups), positions, where="data.train")
        self.collator.check_targets(self.validation_groups, positions, where="data.validation")

    def _collation(self) -> dict[str, Any]:
        names = ("packing", "tokens_per_row", "max_target_tokens")
        return {name: getattr(self.settings, name) for name in names}

    def _training_collator(self, features: FeatureCache | None, positions: int | None) -> Collator:
        objectives = self.recipe.objectives
        others = (objectives.contrastive, objectives.distillation, objectives.self_critical)
        options = self._collation() | {"keep_samples": any(section is not None for section in others)}
        if self.recipe.data.text_only is None:
            remember = not self.recipe.data.streamed
            return Collator(self.processor, features, **options, remember=remember, positions=positions)
        with progress_bar("encoding texts", enabled=self.accelerator.is_main_process) as update:
            vectors = TextVectors.from_texts(
                self.recipe.model.vision_encoder,
                [text for group in self.train_groups for sample in group.samples for text in sample.targets],
                device=self.accelerator.device,
                progress=update,
            )
        return TextOnlyCollator(self.processor, vectors, **options)

    def prepare_optimizer(self) -> None:
        settings, groups = self.settings, known_groups(self.train_groups)
        images = settings.images_per_step // self.num_parts
        self.objectives = WeightedSum.from_recipe(self.recipe, self.model, self.processor, groups, images=images)
        optimizer = build_optimizer(
            settings.optimizer,
            ((re.sub(r"^lm\.", "language_model.", name), p) for name, p in self.model.named_parameters()),
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            part_rates=settings.learning_rates,
        )
        self.model.adapters.set_total_steps(self.total_steps)
        if self.sharding is None:
            self.wrapped, self.optimizer = self.accelerator.prepare(self.objectives, optimizer)
        else:
            self.wrapped, self.optimizer = self.objectives, optimizer

    # ── loop ──

    def begin(self) -> None:
        if self.text_before is not None:
            self.log({"text/perplexity": self.text_before.perplexity})
        super().begin()

    def take_steps(self) -> None:
        # a prepacked copy would be whole on each process
        whole = prepacked_frozen_weights(self.model.language_model) if self.sharding is None else nullcontext()
        with whole:
            super().take_steps()

    def batches(self) -> Iterator[Batch]:
        accumulation, rank = self.settings.gradient_accumulation_steps, self.accelerator.process_index
        return self.load_steps(
            self.train_collator,
            num_parts=self.num_parts,
            parts=range(rank * accumulation, (rank + 1) * accumulation),
            in_memory=not self.recipe.data.streamed
            and (self.collator.features is not None or self.recipe.data.text_only is not None),
        )

    def step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """One optimizer step over all its micro-batches; each term of the loss is a mean over all of them."""
        parts = [self._next_part(batches, number) for number in range(self.settings.gradient_accumulation_steps)]
        with self.accelerator.autocast():
            self.objectives.prepare_step(parts)
        shares, targets = self._shares(parts)
        learning_rate, weights = self.set_learning_rate(), self.objectives.weights(self.share_done())
        values = self._backward(parts, shares, weights)
        norm = float(
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.settings.max_grad_norm or float("inf"))
        )
        loss = sum(weights[name] * value for name, value in values.items())
        # with loss scaling, an infinite gradient only lowers the scale: the scaler skips such a step
        checked = norm if self.accelerator.scaler is None else 0.0
        problem = find_not_finite(loss, checked)
        self._norms.append(norm)
        ranks: dict[str, Any] = {}
        if problem is None:
            self.optimizer.step()
            ranks = self.model.adapters.update(self.progress.step + 1)  # reads the gradients
            self.optimizer.zero_grad(set_to_none=True)
            self.progress.bad_steps = 0
        else:
            ranks["bad_samples"] = self.leave_out_step(problem, learning_rate, self._bad_parts)
        self.count_step(targets)
        named = {f"loss/{name}": value for name, value in values.items()} if list(values) != ["lm"] else {}
        figures = {"gradient_norm": norm, "learning_rate": learning_rate, "targets": targets}
        return {"loss": loss, **named, **self.objectives.figures, **ranks, **figures}

    def _backward(
        self, parts: list[Batch], shares: list[dict[str, float]], weights: dict[str, float]
    ) -> dict[str, float]:
        """Accumulate the gradient of all micro-batches; returns the loss of each term over all processes."""
        losses = {name: torch.zeros((), device=self.accelerator.device) for name in weights}
        finite = []
        for number, (part, share) in enumerate(zip(parts, shares, strict=True)):
            last = number == len(parts) - 1
            self.accelerator.sync_gradients = last
            seed_all(self.recipe.seed, "forward", self._number(number))
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                terms = self.wrapped(part, share)
                # DDP averages gradients over processes; the shares already add up to one
                total = torch.stack([weights[name] * loss for name, loss in terms.items()]).sum()
                self.accelerator.backward(total * self.accelerator.num_processes)
            finite.append(total.detach().isfinite())
            for name, loss in terms.items():
                losses[name] += loss.detach()
        if self.sharding is not None:
            average_gradients(self.accelerator, self.wrapped.parameters())
        self._bad_parts = [number for number, good in enumerate(finite) if not good]
        return {name: float(self.accelerator.reduce(loss, "sum")) for name, loss in losses.items()}

    def _next_part(self, batches: Iterator[Batch], number: int) -> Batch:
        batch = to_device(next(batches), self.accelerator.device)
        seed_all(self.recipe.seed, "prepare", self._number(number))
        return self.objectives.prepare(batch, self._number(number))

    def _number(self, part: int) -> int:
        """Number of a micro-batch of this process and step, 0 and up, among those of all processes and steps."""
        accumulation, rank = self.settings.gradient_accumulation_steps, self.accelerator.process_index
        return self.progress.step * self.num_parts + rank * accumulation + part

    def _shares(self, parts: list[Batch]) -> tuple[list[dict[str, float]], int]:
        """Share of the step that each micro-batch holds, for each term of the loss; and the targets of the step."""
        counts = [self.objectives.counts(part) for part in parts]
        sums = [sum(count[name] for count in counts) for name in self.objectives.names]
        sums.append(sum(part["packed"].num_targets for part in parts))
        *totals, targets = self.accelerator.reduce(torch.tensor(sums, device=self.accelerator.device), "sum").tolist()
        whole = dict(zip(self.objectives.names, totals, strict=True))
        return [{name: count[name] / whole[name] for name in whole} for count in counts], targets

    def finish(self) -> None:
        # a resumed run that had no step left to take was measured before
        if self.progress.step > self.first_step:
            self._check_text()
        super().finish()

    # ── validation ──

    def measure(self) -> dict[str, Any]:
        """Loss with the right and with shuffled images, a few captions, and the metrics of the objectives."""
        size = self.settings.images_per_step
        losses = validation_losses(self.model, self.collator, self.validation_groups, size)
        samples = greedy_captions(self.model, self.processor, self.collator, self.validation_groups)
        if samples is not None:
            self._judge(samples, losses)
        examples = {} if samples is None else samples.values()
        values = losses | examples | self.objectives.validate(self.collator, self.validation_groups, size)
        if self.settings.best_by == "cider_d" and "cider_d" not in values:
            parts = (self.model, self.processor, self.collator, self.validation_groups)
            values["cider_d"] = greedy_cider_d(*parts, images_per_batch=size)
        return values

    def _judge(self, samples: CaptionSamples, losses: dict[str, float]) -> None:
        """Show sample captions, and warn of what is wrong with them from the second third of the run on."""
        step = self.progress.step
        if step == 0 and self.settings.init_from is None:
            self._first_loss = losses["loss"]
        if not self.accelerator.is_main_process:
            return
        show_captions(step, samples)
        if 3 * step > self.total_steps:
            norm = median(self._norms) if self._norms else None
            known = {"first_loss": self._first_loss, "gradient_norm": norm}
            warn_of_symptoms(step, Measured(samples, losses, learning_rate=self.settings.learning_rate, **known))

    def best_of(self, values: dict[str, Any]) -> tuple[str, float]:
        if self.settings.best_by == "cider_d":
            return "minus cider_d", -values["cider_d"]
        return self.objectives.best_by(values)

    def _measure_text(self, *, adapted: bool) -> TextAbility | None:
        path = self.recipe.evaluation.text
        if path is None:
            return None
        return text_ability(self.model, self.processor.tokenizer, read_text(path, "evaluation.text"), adapted)

    def _check_text(self) -> None:
        """Measure the LM on text again, and write both results to the output folder."""
        after = self._measure_text(adapted=True)
        if self.text_before is None or after is None:
            return
        unchanged = after.logits_sha256 == self.text_before.logits_sha256
        self.log({"text/perplexity": after.perplexity, "text/unchanged": unchanged})
        if self.accelerator.is_main_process:
            summary = {"text": self.recipe.evaluation.text, "unchanged": unchanged, "before": asdict(self.text_before)}
            write_text_atomic(self.output_dir / TEXT_FILE, json.dumps({**summary, "after": asdict(after)}, indent=2))
        check_frozen_text(unchanged, trained=self.model.trains_text)

    # ── checkpoints ──

    def read_model(self, folder: Path) -> None:
        super().read_model(folder)
        self.model.adapters.load_state(folder)

    def write_model(self, folder: Path) -> None:
        super().write_model(folder)
        if self.retriever is not None:
            self.retriever.save(folder)

    def write_state(self, folder: Path, random_states: RandomStates) -> None:
        super().write_state(folder, random_states)
        self.model.adapters.save_state(folder)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch; other values stay as they are."""
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
