"""Validation of locked-image tuning: the loss, and recall in both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from frozenprefix.evaluation.tasks.retrieval import retrieval_metrics
from frozenprefix.models.contrastive.losses import LOSSES
from frozenprefix.models.contrastive.modeling import LockedImageTextModel

BEST_BY = ("text_to_image_recall@10", "image_to_text_recall@10")


def embed_by_length(texts: Sequence[str], size: int, embed: Callable[[list[str]], Tensor]) -> Tensor:
    """Embed `size` texts of like length at a time: float[T, D] in the order given."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    parts = [embed([texts[place] for place in order[start : start + size]]) for start in range(0, len(order), size)]
    return torch.cat(parts)[torch.from_numpy(np.argsort(order))]


def contrastive_scores(
    model: LockedImageTextModel,
    images: Tensor,
    texts: Tensor,
    owner: np.ndarray,
    bounds: Sequence[tuple[int, int]],
) -> dict[str, float]:
    """Loss over batches of images, retrieval among all of them, and the mean Recall@10 as `recall@10`.

    Args:
        images: unit vectors float32[P, D]; texts: float32[T, D]; owner: int64[T], the image of each text.
        bounds: of the batches, as places in `images`.
    """
    owners = torch.from_numpy(owner).to(images.device)
    loss = 0.0
    for start, end in bounds:
        mine = (owners >= start) & (owners < end)
        positive = torch.arange(start, end, device=images.device)[:, None] == owners[mine][None, :]
        logits = model.logit_scale(images[start:end], texts[mine])
        loss += float(LOSSES[model.config.objective](logits, positive)) * (end - start) / len(images)
    metrics = retrieval_metrics(images.cpu().numpy(), texts.cpu().numpy(), owner)
    return {"loss": loss, "recall@10": sum(metrics[name] for name in BEST_BY) / len(BEST_BY), **metrics}
