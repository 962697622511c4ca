"""Locked-image tuning: from a contrastive recipe to the best checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from frozenprefix.config.contrastive import ContrastiveRecipe
from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.collation import Collator
from frozenprefix.data.samples import ImageGroup, Sample, group_by_images
from frozenprefix.data.streaming.groups import known_groups
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.evaluation.tasks.retrieval import texts_of
from frozenprefix.kernels.precision import autocast_to
from frozenprefix.models.contrastive.gradient_cache import cached_contrastive_step
from frozenprefix.models.contrastive.processing import LockedImageTextProcessor
from frozenprefix.models.freezing import count_parameters, evaluating
from frozenprefix.training.base_trainer import BaseTrainer
from frozenprefix.training.callbacks import Callback
from frozenprefix.training.guards import find_not_finite
from frozenprefix.training.objectives.base import image_id
from frozenprefix.training.optimizer import build_optimizer
from frozenprefix.training.result import TrainingResult
from frozenprefix.training.run_folder import with_run_precision
from frozenprefix.training.setup import build_locked_model, load_parts, load_validation
from frozenprefix.training.sharding import average_gradients
from frozenprefix.training.validation import batch_bounds, contrastive_scores, embed_by_length
from frozenprefix.utils import report

logger = logging.getLogger(__name__)


def train_contrastive(
    recipe: ContrastiveRecipe, *, resume: str = "auto", callbacks: Sequence[Callback] = ()
) -> TrainingResult:
    """Train the text tower and the projections of a recipe against its locked image encoder.

    Args:
        recipe: the whole experiment.
        resume, callbacks: as in `train`.

    Returns:
        The result; `output_dir/best` holds the checkpoint with the highest mean Recall@10, which is `best_value`.

    Example:
        >>> from frozenprefix.config import load_recipe
        >>> train_contrastive(load_recipe("recipes/lit_flickr8k.yaml"))  # doctest: +SKIP
    """
    return ContrastiveTrainer(with_run_precision(recipe, resume), callbacks=callbacks).run(resume)


class ContrastiveTrainer(BaseTrainer):
    """Trains a text tower and the projections against a locked image encoder (LiT, Zhai et al. 2022).

    Example:
        >>> from frozenprefix.config import load_recipe
        >>> trainer = ContrastiveTrainer(load_recipe("recipes/lit_flickr8k.yaml"))  # doctest: +SKIP
        >>> trainer.run()  # doctest: +SKIP
    """

    lower_is_better = False

    def __init__(self, recipe: ContrastiveRecipe, *, callbacks: Sequence[Callback] = ()):
        super().__init__(recipe, callbacks=callbacks)
        if self.sharding is not None:
            raise ConfigError("accelerate: got FSDP2 for a contrastive recipe, whose text tower is small; use DDP")
        per_step, processes = self.settings.images_per_step, self.accelerator.num_processes
        if per_step % processes:
            raise ConfigError(
                f"training.images_per_step: got {per_step}, expected a multiple of the {processes} processes"
            )

    # ── set-up ──

    def build_model(self) -> None:
        self.model, self.processor = build_locked_model(self.recipe)
        self.model.to(self.accelerator.device)
        logger.info("%s", count_parameters(self.model))

    def prepare_data(self) -> None:
        mixture = self.load_mixture()
        if mixture is None:
            samples = load_parts(self.recipe.data)
            self._check_groups({part: group_by_images(listed) for part, listed in samples.items()})
        else:
            samples = {"train": mixture.listed, "validation": load_validation(self.recipe.data)}
        prepared = self.encode_images(samples)
        groups, train_features = self.mixed_groups(mixture, prepared)
        self.use_data(groups, prepared.features, train_features)

    def use_data(
        self,
        groups: Mapping[str, Sequence[ImageGroup]],
        features: FeatureCache | None,
        train_features: FeatureCache | None,
    ) -> None:
        self._check_groups(groups)
        self.use_groups(groups, features)
        self.collator = ContrastiveCollator(self.processor, features, self.settings.texts_per_chunk)
        self.train_collator = ContrastiveCollator(self.processor, train_features, self.settings.texts_per_chunk)
        if isinstance(self.processor, LockedImageTextProcessor):
            for part, listed in groups.items():
                self._report_cut(self.processor, known_groups(listed), f"data.{part}")

    def _report_cut(self, processor: LockedImageTextProcessor, groups: Sequence[ImageGroup], where: str) -> None:
        """Count the texts that are longer than the tower reads."""
        texts = list(dict.fromkeys(text for group in groups for sample in group.samples for text in sample.targets))
        longest = self.recipe.model.text_tower.max_tokens
        lengths = processor.lengths(texts)
        cut = [text[:80] for text, length in zip(texts, lengths, strict=True) if length > longest]
        reasons = {f"longer than model.text_tower.max_tokens = {longest}": len(cut)}
        report(where, len(texts), reasons, done="cut", what="targets", examples=cut)

    def _check_groups(self, groups: Mapping[str, Sequence[ImageGroup]]) -> None:
        if any(len(group.images) != 1 for listed in groups.values() for group in known_groups(listed)):
            raise DataError("data: got samples with several images or none; contrastive training needs one each")
        per_step = self.settings.images_per_step
        if len(groups["train"]) < per_step:
            raise DataError(
                f"data.train: got {len(groups['train'])} images that can be read, expected at least "
                f"training.images_per_step = {per_step}"
            )

    def prepare_optimizer(self) -> None:
        settings = self.settings
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        # not wrapped for several processes: gradients are averaged by hand, as a step may run a tower several times
        self.optimizer = build_optimizer(
            settings.optimizer,
            self.model.named_parameters(),
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            part_rates={"text_tower": settings.tower_learning_rate},
        )

    # ── loop ──

    def batches(self) -> Iterator[dict[str, Any]]:
        return self.load_steps(
            self.train_collator,
            num_parts=self.num_parts,
            parts=[self.accelerator.process_index],
            in_memory=self.collator.features is not None and not self.recipe.data.streamed,
        )

    def step(self, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
        batch = next(batches)
        learning_rate = self.set_learning_rate()
        features = self._features(batch)
        ids = [batch[name].to(self.accelerator.device) for name in ("image_ids", "text_ids")]

        def loss_of(images: Tensor, texts: Tensor) -> Tensor:
            return self.model.loss(images, texts, *ids)

        if self.settings.gradient_cache:
            loss = cached_contrastive_step(self._embed_images, [features], self._embed_texts, batch["texts"], loss_of)
        else:
            texts = torch.cat([self._embed_texts(chunk) for chunk in batch["texts"]])
            loss = loss_of(self._embed_images(features), texts)
            loss.backward()
            loss = loss.detach()
        average_gradients(self.accelerator, self.trained)  # the loss was gathered: it is the same everywhere
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, self.settings.max_grad_norm or float("inf")))
        problem = find_not_finite(float(loss), norm)
        bad: dict[str, Any] = {}
        if problem is None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.progress.bad_steps = 0
        else:  # the loss compares all images of a step: none of them can be singled out
            bad["bad_samples"] = self.leave_out_step(problem, learning_rate, [])
        targets = int(self.accelerator.reduce(torch.tensor(len(ids[1]), device=self.accelerator.device), "sum"))
        self.count_step(targets)
        scale = float(self.model.logit_scale.scale.detach())
        values = {"loss": float(loss), "gradient_norm": norm, "learning_rate": learning_rate, "logit_scale": scale}
        return {**values, **bad, "targets": targets}

    def _features(self, batch: dict[str, Any]) -> Tensor:
        if "image_features" in batch:
            return batch["image_features"].to(self.accelerator.device)
        parts = batch["pixel_values"].split(32)
        return torch.cat([self.model.encode(part.to(self.accelerator.device)) for part in parts])

    def _autocast(self) -> torch.autocast:
        half = self.settings.precision == "bf16"
        return autocast_to(torch.bfloat16 if half else None, self.accelerator.device)

    def _embed_images(self, image_features: Tensor) -> Tensor:
        with self._autocast():
            return self.model.encode_image(image_features=image_features)

    def _embed_texts(self, chunk: dict[str, Tensor]) -> Tensor:
        with self._autocast():
            return self.model.encode_text(**{name: value.to(self.accelerator.device) for name, value in chunk.items()})

    # ── validation ──

    def best_of(self, values: dict[str, Any]) -> tuple[str, float]:
        return "recall@10", values["recall@10"]

    def measure(self) -> dict[str, Any]:
        texts, owner = texts_of(self.validation_groups)
        bounds = batch_bounds(len(self.validation_groups), self.settings.images_per_step)
        with evaluating(self.model):
            images = torch.cat([self._embed_images(self._validation_features(*part)) for part in bounds])
            text_embeds = embed_by_length(texts, self.settings.texts_per_chunk, self._embed_raw_texts)
            return contrastive_scores(self.model, images.float(), text_embeds.float(), owner, bounds)

    def _embed_raw_texts(self, texts: list[str]) -> Tensor:
        return self._embed_texts(self.processor.prepare_texts(texts))

    def _validation_features(self, start: int, end: int) -> Tensor:
        return self._features(
            self.collator.image_inputs([group.images[0] for group in self.validation_groups[start:end]])
        )


class ContrastiveCollator:
    """Turns images and their chosen texts into a batch.

    Args:
        features: the feature cache; None decodes images.
        texts_per_chunk: texts that are encoded at a time, sorted by length to save padding and memory.
    """

    def __init__(self, processor: Any, features: FeatureCache | None, texts_per_chunk: int):
        self.processor, self.features, self.texts_per_chunk = processor, features, texts_per_chunk
        self.image_inputs = Collator(processor, features).image_inputs

    def __call__(self, groups: Sequence[ImageGroup], chosen: Sequence[Sequence[tuple[Sample, str]]]) -> dict[str, Any]:
        """Returns the images' inputs, `texts` (a list of chunks), `image_ids` int64[P] and `text_ids` int64[T]."""
        ids = [image_id(group) for group in groups]
        pairs = [(text, ids[i]) for i, picked in enumerate(chosen) for _, text in picked]
        pairs.sort(key=lambda pair: len(pair[0]))
        chunks = [pairs[i : i + self.texts_per_chunk] for i in range(0, len(pairs), self.texts_per_chunk)]
        return {
            **self.image_inputs([group.images[0] for group in groups]),
            "texts": [self.processor.prepare_texts([text for text, _ in chunk]) for chunk in chunks],
            "image_ids": torch.tensor(ids),
            "text_ids": torch.tensor([number for _, number in pairs]),
        }
