"""Contrastive loss between images and their captions, as in FROMAGe."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frozenprefix.config.objectives import ContrastiveObjective
from frozenprefix.data.collation import Collator
from frozenprefix.data.samples import ImageGroup
from frozenprefix.evaluation.metrics.recall import first_ranks
from frozenprefix.models.contrastive.losses import contrastive_loss
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.training.objectives.base import Batch, Objective, image_id

TEXTS = 128  # texts that are encoded at once in validation


class Contrastive(Objective):
    """Pulls the prefix of an image and the embeddings of its captions together, and others apart.

    Both are projected by the model's contrastive heads (Koh et al. 2023, section 3.2).

    Example:
        >>> from frozenprefix.training.objectives import Contrastive
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

    def count(self, batch: Batch) -> int:
        return 1  # one loss over the images and texts of all processes

    def loss(self, batch: Batch, prefix_embeds: Tensor) -> Tensor:
        return contrastive_loss(
            self.section.loss,
            self.model.heads.logit_scale,
            self.model.heads.embed_prefix(prefix_embeds),
            self.model.encode_text(**batch["texts"]),
            batch["image_ids"],
            batch["text_ids"],
        )

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
