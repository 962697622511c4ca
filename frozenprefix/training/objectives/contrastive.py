"""Contrastive loss between images and their captions, as in FROMAGe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frozenprefix.config.objectives import ContrastiveObjective
from frozenprefix.data.collation import Collator
from frozenprefix.data.samples import ImageGroup
from frozenprefix.evaluation.metrics.recall import first_ranks
from frozenprefix.models.contrastive.losses import contrastive_loss
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.training.objectives.base import Batch, Objective, image_id, image_inputs
from frozenprefix.utils.random_state import random_state

TEXTS = 128  # texts that are encoded at once in validation


@dataclass(frozen=True)
class StepGradient:
    """Loss of a step of several micro-batches, with its gradient for the embeddings of one of them.

    Attributes:
        images: float32[P, D]; texts: float32[T, D]; scale: for each parameter of the logit scale.
        parts: micro-batches of this process.
    """

    loss: Tensor
    images: Tensor
    texts: Tensor
    scale: Sequence[Tensor]
    parts: int


class Contrastive(Objective):
    """Pulls the prefix of an image and the embeddings of its captions together, and others apart.

    Both are projected by the model's contrastive heads (Koh et al. 2023, section 3.2). All images of a step are
    compared, also if gradients accumulate over several micro-batches: these are then encoded twice, first without and
    then with gradient (Gao et al. 2021, arXiv 2101.06983).

    Example:
        >>> Contrastive.name
        'contrastive'
    """

    name = "contrastive"

    def __init__(
        self,
        model: FrozenPrefixForConditionalGeneration,
        processor: FrozenPrefixProcessor,
        section: ContrastiveObjective,
    ):
        super().__init__(section.weight)
        self.model, self.processor, self.section = model, processor, section

    def prepare(self, batch: Batch, number: int) -> None:
        ids = [image_id(group) for group, _ in batch["samples"]]
        texts = [id_ for id_, (_, pairs) in zip(ids, batch["samples"], strict=True) for _ in pairs]
        batch["image_ids"] = torch.tensor(ids, device=self.model.device)
        batch["text_ids"] = torch.tensor(texts, device=self.model.device)

    def prepare_step(self, batches: Sequence[Batch]) -> None:
        """Compute the gradient of the loss for the embeddings of all micro-batches."""
        if len(batches) == 1:
            return
        embeds: list[tuple[Tensor, Tensor]] = []
        for batch in batches:
            batch["random_state"] = random_state()  # for the same dropout when `forward` encodes them again
            with torch.no_grad():
                prefix_embeds = self.model.prefix(**image_inputs(batch))
                assert prefix_embeds is not None
                embeds.append(self._embed(batch, prefix_embeds))
        # The loss compares all images of the step, of which a micro-batch holds only some. Its gradient for every
        # embedding is computed here, once; `loss` then carries each micro-batch's part back through the model.
        images, texts = (torch.cat(parts).requires_grad_() for parts in zip(*embeds, strict=True))
        image_ids, text_ids = (torch.cat([batch[name] for batch in batches]) for name in ("image_ids", "text_ids"))
        scale = self.model.heads.logit_scale
        loss = contrastive_loss(self.section.loss, scale, images, texts, image_ids, text_ids)
        of_images, of_texts, *of_scale = torch.autograd.grad(loss, [images, texts, *scale.parameters()])
        image_parts = of_images.split([len(part) for part, _ in embeds])
        text_parts = of_texts.split([len(part) for _, part in embeds])
        for batch, of_image, of_text in zip(batches, image_parts, text_parts, strict=True):
            batch["step_gradient"] = StepGradient(loss.detach(), of_image, of_text, of_scale, len(batches))

    def _embed(self, batch: Batch, prefix_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of images and texts: float32[P, D] and float32[T, D]."""
        return self.model.heads.embed_prefix(prefix_embeds), self.model.encode_text(**batch["texts"])

    def count(self, batch: Batch) -> int:
        return 1  # one loss over the images and texts of all processes

    def loss(self, batch: Batch, prefix_embeds: Tensor | None) -> Tensor:
        assert prefix_embeds is not None  # samples without an image are refused
        images, texts = self._embed(batch, prefix_embeds)
        scale = self.model.heads.logit_scale
        step: StepGradient | None = batch.get("step_gradient")
        if step is None:
            return contrastive_loss(self.section.loss, scale, images, texts, batch["image_ids"], batch["text_ids"])
        # A linear function with the gradient that the loss over all micro-batches has. The trainer averages over the
        # micro-batches; the embeddings of each are in one of them only, the scale is in all.
        linear = step.parts * ((images * step.images).sum() + (texts * step.texts).sum())
        for parameter, gradient in zip(scale.parameters(), step.scale, strict=True):
            linear = linear + (parameter * gradient).sum()
        return step.loss + (linear - linear.detach())

    def validate(self, collator: Collator, groups: Sequence[ImageGroup], size: int) -> dict[str, float]:
        """`recall@1` between all images and all their captions, averaged over both directions."""
        samples = [(i, sample) for i, group in enumerate(groups) for sample in group.samples]
        texts = [(i, text) for i, sample in samples if sample.task == "caption" for text in sample.targets]
        if not texts:
            return {}
        owners = torch.tensor([owner for owner, _ in texts])
        captioned = owners.unique().tolist()
        images, captions = [], []
        for start in range(0, len(captioned), size):
            inputs = collator.image_inputs([groups[i].images[0] for i in captioned[start : start + size]])
            inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
            images.append(self.model.encode_image(**inputs).cpu())
        for start in range(0, len(texts), TEXTS):
            part = self.processor.prepare_texts([text for _, text in texts[start : start + TEXTS]])
            inputs = {name: value.to(self.model.device) for name, value in part.items()}
            captions.append(self.model.encode_text(**inputs).cpu())
        cosines = (torch.cat(images) @ torch.cat(captions).t()).numpy()
        captions_of = [(owners == i).nonzero().flatten().tolist() for i in captioned]
        image_of = [[captioned.index(i)] for i in owners.tolist()]
        ranks = first_ranks(cosines, captions_of), first_ranks(cosines.T, image_of)
        return {"recall@1": sum(float((r == 1).mean()) for r in ranks) / 2}
