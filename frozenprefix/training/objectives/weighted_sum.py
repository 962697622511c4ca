"""The loss of a step: a weighted sum of objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frozenprefix.config.objectives import is_used, weight_at
from frozenprefix.config.recipe import Recipe
from frozenprefix.data.collation import Collator
from frozenprefix.data.samples import ImageGroup
from frozenprefix.errors import ConfigError
from frozenprefix.models.freezing import evaluating
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.training.objectives.base import Batch, Objective, check_captions, image_inputs
from frozenprefix.training.objectives.contrastive import Contrastive
from frozenprefix.training.objectives.distillation import Distillation, distillation_pieces
from frozenprefix.training.objectives.language_model import NextToken
from frozenprefix.training.objectives.self_critical import SelfCritical, reward_references
from frozenprefix.utils.random_state import set_random_state


class WeightedSum(nn.Module):
    """A model and its objectives. With several processes, DDP wraps this module instead of the model.

    Args:
        terms: the objectives; those whose weight is always 0 are left out of `forward`.
        noise: variance of Gaussian noise on the image features, for training on text alone.
        max_target_tokens: longer texts are cut.

    Example:
        >>> loss = WeightedSum(model, processor, [NextToken(model, weight=(1.0, 0.0))])
        >>> loss.names, loss.weights(0.25)
        (['lm'], {'lm': 0.75})
    """

    def __init__(
        self,
        model: FrozenPrefixForConditionalGeneration,
        processor: FrozenPrefixProcessor,
        terms: Sequence[Objective],
        *,
        noise: float = 0.0,
        max_target_tokens: int | None = None,
    ):
        super().__init__()
        self.model, self.processor, self.terms = model, processor, list(terms)
        self.used = [term for term in terms if is_used(term.weight)]
        self.noise, self.max_target_tokens = noise, max_target_tokens

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe,
        model: FrozenPrefixForConditionalGeneration,
        processor: FrozenPrefixProcessor,
        groups: Sequence[ImageGroup],
        *,
        images: int,
    ) -> WeightedSum:
        """Build the objectives of a recipe.

        Args:
            groups: the training images with their samples.
            images: images per micro-batch.

        Raises:
            ConfigError: for an objective that does not fit the model or the data.
        """
        sections, text_only, settings = recipe.objectives, recipe.data.text_only, recipe.training
        samples = [sample for group in groups for sample in group.samples]
        terms: list[Objective] = []
        if sections.contrastive is not None:  # first: it may be computed twice, with the same dropout
            check_captions(samples, "objectives.contrastive")
            terms.append(Contrastive(model, processor, sections.contrastive))
        regularised = {"label_smoothing": settings.label_smoothing, "word_dropout": settings.word_dropout}
        terms.append(NextToken(model, sections.lm, **regularised))
        if sections.distillation is not None:
            if not model.trains_text:
                raise ConfigError(
                    "objectives.distillation: the language model has no trained parameters, so it cannot drift; remove "
                    "this key, or train adapters in the language model"
                )
            weight, texts = sections.distillation.weight, sections.distillation.texts
            pieces = distillation_pieces(processor, texts)
            terms.append(Distillation(model, weight=weight, pieces=pieces, images=images, seed=recipe.seed))
        if sections.self_critical is not None:
            check_captions(samples, "objectives.self_critical")
            references = reward_references(groups)
            terms.append(SelfCritical(model, processor, sections.self_critical, references, settings.packing))
        noise = 0.0 if text_only is None else text_only.noise
        return cls(model, processor, terms, noise=noise, max_target_tokens=settings.max_target_tokens)

    @property
    def names(self) -> list[str]:
        """Names of the terms with a weight above 0."""
        return [term.name for term in self.used]

    def weights(self, done: float) -> dict[str, float]:
        """Weight of each term when a share `done` of the run, 0 to 1, is over."""
        return {term.name: weight_at(term.weight, done) for term in self.used}

    @property
    def figures(self) -> dict[str, float]:
        """Further numbers to log for the latest batch."""
        return {f"{term.name}/{name}": value for term in self.terms for name, value in term.figures.items()}

    @torch.no_grad()
    def prepare(self, batch: Batch, number: int) -> Batch:
        """Complete a collated batch; see `Objective.prepare`."""
        if self.noise:
            features = batch["image_features"]
            noise = torch.randn_like(features) * self.noise**0.5
            batch["image_features"] = F.normalize(features + noise, dim=-1)
        if len(self.terms) > 1:
            texts = [text for _, pairs in batch["samples"] for _, text in pairs]
            prepared = self.processor.prepare_texts(texts, self.max_target_tokens)
            batch["texts"] = {name: value.to(self.model.device) for name, value in prepared.items()}
        for term in self.terms:
            term.prepare(batch, number)
        return batch

    def prepare_step(self, batches: Sequence[Batch]) -> None:
        """Complete all micro-batches of this process in a step; see `Objective.prepare_step`."""
        for term in self.terms:
            term.prepare_step(batches)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Number of items that the loss of each term is a mean over."""
        return {term.name: term.count(batch) for term in self.used}

    def forward(self, batch: Batch, factors: dict[str, float]) -> dict[str, Tensor]:
        """Loss of each term in `factors`, times its factor."""
        if "random_state" in batch:
            set_random_state(batch["random_state"])
        # [images, 3, H, W] or [images, N, D_enc] -> [images, P, D_lm]
        prefix_embeds = self.model.prefix(**image_inputs(batch))
        used = [term for term in self.used if term.name in factors]
        losses = {term.name: term.loss(batch, prefix_embeds) * factors[term.name] for term in used}
        if prefix_embeds is None and losses:
            # Text alone: the parts that see images get a gradient of zero. DDP waits for a gradient of every parameter.
            zero = sum(p.sum() for p in self.parameters() if p.requires_grad) * 0.0
            losses[used[0].name] = losses[used[0].name] + zero
        return losses

    def validate(self, collator: Collator, groups: Sequence[ImageGroup], size: int) -> dict[str, float]:
        """Metrics of all objectives on validation images."""
        values: dict[str, float] = {}
        with evaluating(self.model):
            for term in self.terms:
                values |= term.validate(collator, groups, size)
        return values

    def best_by(self, values: Mapping[str, Any]) -> tuple[str, float]:
        """Name and value of the measure that the best checkpoint is chosen by; lower is better.

        It is the validation loss; with self-critical training, under which that loss rises, minus CIDEr-D; without
        the next-token loss minus Recall@1.
        """
        for name in ("cider_d", "recall@1") if "lm" not in self.names else ("cider_d",):
            if name in values:
                return f"minus {name}", -values[name]
        return "loss", values["loss"]
