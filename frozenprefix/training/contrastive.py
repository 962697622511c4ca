"""Locked-image tuning: from a contrastive recipe to the best checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.collation import StepDataset
from frozenprefix.data.features import PictureEncoder
from frozenprefix.data.processes import Processes
from frozenprefix.data.samplers import PictureStream
from frozenprefix.data.samples import PictureGroup
from frozenprefix.errors import CheckpointError, ConfigError, DataError
from frozenprefix.evaluation.retrieval import texts_of
from frozenprefix.models.contrastive.gradient_cache import cached_contrastive_step
from frozenprefix.models.freezing import count_parameters
from frozenprefix.training import checkpoints
from frozenprefix.training.allocator import keep_freed_memory
from frozenprefix.training.contrastive_recipe import ContrastiveRecipe
from frozenprefix.training.contrastive_setup import ContrastiveCollator, build_locked_model
from frozenprefix.training.contrastive_validation import contrastive_scores, embed_by_length
from frozenprefix.training.guards import check_finite
from frozenprefix.training.loop import TrainingResult
from frozenprefix.training.schedule import learning_rate_factor
from frozenprefix.training.setup import load_parts, prepare_pictures
from frozenprefix.training.tracking import Tracker, progress_bar
from frozenprefix.training.validation import batch_bounds

logger = logging.getLogger(__name__)


def train_contrastive(recipe: ContrastiveRecipe, *, resume: str = "auto") -> TrainingResult:
    """Train the text tower and the projections of a recipe against its locked image encoder.

    Args:
        recipe: the whole experiment.
        resume: as in `train`.

    Returns:
        The result; `output_dir/best` holds the checkpoint with the highest mean Recall@10, which is `best_value`.
    """
    return ContrastiveTrainer(recipe).run(resume)


class ContrastiveTrainer:
    """Holds the parts of one run. Use `train_contrastive`."""

    def __init__(self, recipe: ContrastiveRecipe):
        self.recipe, self.settings = recipe, recipe.training
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        keep_freed_memory()
        set_seed(recipe.seed)
        self.output_dir = Path(recipe.output_dir)
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
            "recall@10",
        )

    # ── set-up ──

    def _build(self) -> None:
        self.model, self.processor = build_locked_model(self.recipe)
        self.model.to(self.accelerator.device)
        logger.info("%s", count_parameters(self.model))

    def _prepare_data(self) -> None:
        task = self.bar.add_task("encoding pictures", total=None, note="")
        encoder: Any = PictureEncoder.of(self.model, self.processor)  # type: ignore[arg-type]
        prepared = prepare_pictures(
            encoder,
            load_parts(self.recipe.data),
            self.recipe.data,
            processes=Processes.of(self.accelerator),
            bad_list=self.output_dir / "bad_pictures.jsonl" if self.accelerator.is_main_process else None,
            progress=lambda done, total: self.bar.update(task, completed=done, total=total),
        )
        self.bar.remove_task(task)
        self._use_data(prepared.groups, prepared.features)

    def _use_data(self, groups: dict[str, list[PictureGroup]], features: FeatureCache | None) -> None:
        if any(len(group.images) != 1 for listed in groups.values() for group in listed):
            raise DataError("data: got samples with several pictures or none; contrastive training needs one each")
        per_step, processes = self.settings.pictures_per_step, self.accelerator.num_processes
        if per_step % processes:
            raise ConfigError(
                f"training.pictures_per_step: got {per_step}, expected a multiple of the {processes} processes"
            )
        self.train_groups = groups["train"]
        if len(self.train_groups) < per_step:
            raise DataError(
                f"data.train: got {len(self.train_groups)} pictures that can be read, expected at least "
                f"training.pictures_per_step = {per_step}"
            )
        self.validation_groups = groups.get("validation", [])[: self.settings.validation_pictures]
        self.collator = ContrastiveCollator(self.processor, features, self.settings.texts_per_chunk)
        self.stream = PictureStream(len(self.train_groups), per_step, self.recipe.seed)
        pictures = (self.settings.epochs or 1) * len(self.train_groups)
        self.total_steps = self.settings.max_steps or -(-pictures // per_step)

    def _prepare_optimizer(self) -> None:
        settings = self.settings
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        groups = []
        for in_tower, peak in ((True, settings.tower_learning_rate), (False, settings.learning_rate)):
            for matrices, decay in ((True, settings.weight_decay), (False, 0.0)):
                picked = [p for n, p in named if n.startswith("text_tower.") == in_tower and (p.ndim > 1) == matrices]
                groups += [{"params": picked, "lr": peak, "peak": peak, "weight_decay": decay}] if picked else []
        self.trained = [p for _, p in named]
        # not wrapped for several processes: gradients are averaged by hand, as a step may run a tower several times
        self.optimizer = torch.optim.AdamW(groups, betas=settings.betas, fused=True)

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
        settings, progress = self.settings, self.progress
        self.started = time.monotonic() - progress.seconds
        task = self.bar.add_task("training", total=self.total_steps, completed=progress.step, note="")
        if progress.step == 0:
            self._validate()
        batches = self._batches()
        self.model.train()
        while progress.step < self.total_steps and self._share_of_time() <= 1 and not self._out_of_patience():
            before = time.monotonic()
            values = self._step(batches)
            rate = values["targets"] / (time.monotonic() - before)
            self.bar.update(task, completed=progress.step, note=f"loss {values['loss']:.3f}  {rate:.1f} texts/s")
            if progress.step % settings.log_every == 0:
                self.tracker.log(progress.step, {**values, "targets_per_s": rate})
            if progress.step % settings.validate_every == 0:
                self._validate()
            if progress.step % settings.save_every == 0:
                self._save_last()
        self.bar.update(task, total=progress.step)
        if progress.validated_step != progress.step:
            self._validate()
        self._save_last()

    def _batches(self) -> Iterator[dict[str, Any]]:
        dataset = StepDataset(
            self.train_groups,
            self.stream,
            self.collator,  # type: ignore[arg-type]
            num_steps=self.total_steps,
            targets_per_picture=self.settings.targets_per_picture,
            num_parts=self.accelerator.num_processes,
            parts=[self.accelerator.process_index],
        )
        workers = 0 if self.collator.features is not None else self.recipe.data.workers
        remaining, own = range(self.progress.step, len(dataset)), torch.Generator()
        return iter(DataLoader(dataset, batch_size=None, sampler=remaining, num_workers=workers, generator=own))

    def _step(self, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
        batch = next(batches)
        learning_rate = self._set_learning_rate()
        features = self._features(batch)
        ids = [batch[name].to(self.accelerator.device) for name in ("picture_ids", "text_ids")]

        def loss_of(pictures: Tensor, texts: Tensor) -> Tensor:
            return self.model.loss(pictures, texts, *ids)

        if self.settings.gradient_cache:
            loss = cached_contrastive_step(self._embed_pictures, [features], self._embed_texts, batch["texts"], loss_of)
        else:
            texts = torch.cat([self._embed_texts(chunk) for chunk in batch["texts"]])
            loss = loss_of(self._embed_pictures(features), texts)
            loss.backward()
            loss = loss.detach()
        self._average_gradients()
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, self.settings.max_grad_norm or float("inf")))
        check_finite(self.progress.step + 1, float(loss), norm, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        targets = int(self.accelerator.reduce(torch.tensor(len(ids[1]), device=self.accelerator.device), "sum"))
        self.progress.step += 1
        self.progress.targets_seen += targets
        self.progress.seconds = time.monotonic() - self.started
        scale = float(self.model.logit_scale.scale.detach())
        values = {"loss": float(loss), "gradient_norm": norm, "learning_rate": learning_rate, "logit_scale": scale}
        return {**values, "targets": targets}

    def _features(self, batch: dict[str, Any]) -> Tensor:
        if "image_features" in batch:
            return batch["image_features"].to(self.accelerator.device)
        parts = batch["pixel_values"].split(32)
        return torch.cat([self.model.encode(part.to(self.accelerator.device)) for part in parts])

    def _autocast(self) -> torch.autocast:
        half = self.settings.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16 if half else None, enabled=half)

    def _embed_pictures(self, image_features: Tensor) -> Tensor:
        with self._autocast():
            return self.model.encode_image(image_features=image_features)

    def _embed_texts(self, chunk: dict[str, Tensor]) -> Tensor:
        with self._autocast():
            return self.model.encode_text(**{name: value.to(self.accelerator.device) for name, value in chunk.items()})

    def _average_gradients(self) -> None:
        """What DDP does; the loss is the same on all processes, and its gradient was gathered as a sum."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
        mean = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
        for p, part in zip(self.trained, mean.split([g.numel() for g in gradients]), strict=True):
            p.grad = part.view_as(p)

    def _set_learning_rate(self) -> float:
        settings = self.settings
        done = max(self.progress.step / self.total_steps, self._share_of_time())
        factor = learning_rate_factor(settings.schedule, self.progress.step, settings.warmup_steps, done)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        return settings.learning_rate * factor

    def _share_of_time(self) -> float:
        """Share of max_minutes that is over, by the main process's clock: all processes have to act on one value."""
        if self.settings.max_minutes is None:
            return 0.0
        seconds = torch.tensor(time.monotonic() - self.started, device=self.accelerator.device)
        return float(broadcast(seconds)) / (60 * self.settings.max_minutes)

    def _out_of_patience(self) -> bool:
        patience = self.settings.early_stopping_patience
        return patience is not None and self.progress.bad_validations >= patience

    # ── validation and saving ──

    def _validate(self) -> None:
        """Measure loss and recall; keep the checkpoint with the highest mean Recall@10."""
        self.progress.validated_step = self.progress.step
        if not self.validation_groups:
            self._save_best()
            return
        measured = self._measure()
        self.tracker.log(self.progress.step, {f"validation/{name}": value for name, value in measured.items()})
        if self.progress.step == 0:
            return
        value = measured["recall@10"]
        if self.progress.best_value is None or value > self.progress.best_value:
            self.progress.best_value, self.progress.best_step = value, self.progress.step
            self.progress.bad_validations = 0
            self._save_best()
        else:
            self.progress.bad_validations += 1

    def _measure(self) -> dict[str, float]:
        self.model.eval()
        texts, owner = texts_of(self.validation_groups)
        bounds = batch_bounds(len(self.validation_groups), self.settings.pictures_per_step)
        with torch.no_grad():
            pictures = torch.cat([self._embed_pictures(self._validation_features(*part)) for part in bounds])
            text_embeds = embed_by_length(texts, self.settings.texts_per_chunk, self._embed_raw_texts)
            measured = contrastive_scores(self.model, pictures.float(), text_embeds.float(), owner, bounds)
        self.model.train()
        return measured

    def _embed_raw_texts(self, texts: list[str]) -> Tensor:
        return self._embed_texts(self.processor.prepare_texts(texts))

    def _validation_features(self, start: int, end: int) -> Tensor:
        return self._features(self.collator.pictures([group.images[0] for group in self.validation_groups[start:end]]))

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
        (folder / "recipe.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
