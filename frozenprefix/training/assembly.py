"""The parts of a run, put together from its recipe: model, data, objectives, optimizer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from frozenprefix.config.recipe import Recipe
from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.collation import Collator
from frozenprefix.data.samples import ImageGroup, Sample, group_by_images
from frozenprefix.data.text_only import TextOnlyCollator, TextVectors
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.evaluation.text_ability import TextAbility, read_text, text_ability
from frozenprefix.models.freezing import count_parameters
from frozenprefix.training import checkpoints
from frozenprefix.training.base_trainer import TrainingRun
from frozenprefix.training.objectives.self_critical import SelfCritical, reward_references
from frozenprefix.training.objectives.weighted_sum import (
    Batch,
    Contrastive,
    Distillation,
    Objective,
    Objectives,
    check_captions,
    distillation_pieces,
)
from frozenprefix.training.setup import add_similar_captions, build_model, load_parts

logger = logging.getLogger(__name__)


class RunParts(TrainingRun):
    """Builds and holds the parts of a run that trains a mapper."""

    def __init__(self, recipe: Recipe):
        half = recipe.training.precision == "fp16"
        if half and not torch.accelerator.is_available():
            raise ConfigError("training.precision: fp16 needs a GPU; use bf16 or fp32 on the CPU")
        super().__init__(recipe, mixed_precision="fp16" if half else "no")

    def _build(self) -> None:
        self.model, self.processor = build_model(self.recipe)
        self.model.to(self.accelerator.device)
        refusal = self.model.lm.packing_problem() if self.settings.packing != "none" else None
        if refusal:
            raise ConfigError(f"training.packing: {refusal}")
        logger.info("%s", count_parameters(self.model))
        self.text_before = self._measure_text(adapted=False)
        if self.settings.init_from is not None:
            checkpoints.load_initial(self.model, Path(self.settings.init_from).expanduser())

    def _measure_text(self, *, adapted: bool) -> TextAbility | None:
        path = self.recipe.evaluation.text
        if path is None:
            return None
        return text_ability(self.model, self.processor.tokenizer, read_text(path, "evaluation.text"), adapted)

    def _prepare_data(self) -> None:
        samples = load_parts(self.recipe.data)
        # with text alone, the images of the training part are never looked at
        unseen = {"train": group_by_images(samples.pop("train"))} if self.recipe.data.text_only else {}
        prepared = self._encode_images(samples)
        self.retriever = add_similar_captions(prepared, self.recipe.data)
        self._use_data(prepared.groups | unseen, prepared.features)

    def _use_data(self, groups: dict[str, list[ImageGroup]], features: FeatureCache | None) -> None:
        if not groups["train"]:
            raise DataError("data.train: not one image can be read; bad_images.jsonl in the output folder says why")
        self._take_groups(groups)
        self.collator = Collator(self.processor, features, **self._collation())
        self.train_collator = self._training_collator(features)
        per_step = self.settings.images_per_step
        self.num_parts = self.settings.gradient_accumulation_steps * self.accelerator.num_processes
        if per_step % self.num_parts:
            raise ConfigError(
                f"training.images_per_step must be a multiple of gradient_accumulation_steps x processes = "
                f"{self.num_parts}, got {per_step}"
            )

    def _collation(self) -> dict[str, Any]:
        names = ("packing", "tokens_per_row", "max_target_tokens")
        return {name: getattr(self.settings, name) for name in names}

    def _training_collator(self, features: FeatureCache | None) -> Collator:
        objectives = self.recipe.objectives
        further = (objectives.contrastive, objectives.distillation, objectives.self_critical)
        keep_samples = any(section is not None for section in further)
        if self.recipe.data.text_only is None:
            return Collator(self.processor, features, **self._collation(), keep_samples=keep_samples)
        task = self.bar.add_task("encoding texts", total=None, note="")
        vectors = TextVectors.of(
            self.recipe.model.vision_encoder,
            [text for sample in self._train_samples() for text in sample.targets],
            device=self.accelerator.device,
            progress=lambda done, total: self.bar.update(task, completed=done, total=total),
        )
        self.bar.remove_task(task)
        return TextOnlyCollator(self.processor, vectors, **self._collation(), keep_samples=keep_samples)

    def _train_samples(self) -> list[Sample]:
        return [sample for group in self.train_groups for sample in group.samples]

    def _make_objectives(self) -> Objectives:
        sections, text_only = self.recipe.objectives, self.recipe.data.text_only
        others: list[Objective] = []
        if sections.contrastive is not None:
            check_captions(self._train_samples(), "objectives.contrastive")
            others.append(Contrastive(self.model, self.processor, sections.contrastive))
        if sections.distillation is not None:
            if not self.model.trains_text:
                raise ConfigError(
                    "objectives.distillation: nothing in the language model is trained, it cannot drift from the bare "
                    "one; remove this, or train adapters in it"
                )
            pieces = distillation_pieces(self.processor, sections.distillation.texts)
            images = self.settings.images_per_step // self.num_parts
            others.append(Distillation(self.model, sections.distillation, pieces, images, self.recipe.seed))
        if sections.self_critical is not None:
            check_captions(self._train_samples(), "objectives.self_critical")
            references = reward_references(self.train_groups)
            packing = self.settings.packing
            others.append(SelfCritical(self.model, self.processor, sections.self_critical, references, packing))
        return Objectives(
            self.model,
            self.processor,
            lm=sections.lm,
            others=others,
            noise=0.0 if text_only is None else text_only.noise,
            max_target_tokens=self.settings.max_target_tokens,
        )

    def _prepare_optimizer(self) -> None:
        self.objectives = self._make_objectives()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained,
            lr=self.settings.learning_rate,
            betas=self.settings.betas,
            weight_decay=self.settings.weight_decay,
            fused=True,  # one pass over the weights in place of ten
        )
        self.model.adapters.set_total_steps(self.total_steps)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.objectives, optimizer)

    def _batches(self) -> Iterator[Batch]:
        accumulation, rank = self.settings.gradient_accumulation_steps, self.accelerator.process_index
        return self._load_steps(
            self.train_collator,
            num_parts=self.num_parts,
            parts=range(rank * accumulation, (rank + 1) * accumulation),
            in_memory=self.collator.features is not None or self.recipe.data.text_only is not None,
        )

    def _read_model(self, folder: Path) -> None:
        super()._read_model(folder)
        self.model.adapters.load_state(folder)

    def _write_model(self, folder: Path) -> None:
        super()._write_model(folder)
        if self.retriever is not None:
            self.retriever.save(folder)

    def _write_state(self, folder: Path) -> None:
        super()._write_state(folder)
        self.model.adapters.save_state(folder)
