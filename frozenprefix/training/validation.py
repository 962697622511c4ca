"""Validation: loss with right and with shuffled images, and the scores of contrastive training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from frozenprefix.data.collation import Collator
from frozenprefix.data.samples import ImageGroup, swap_images
from frozenprefix.errors import TrainingError
from frozenprefix.evaluation.tasks.retrieval import retrieval_metrics
from frozenprefix.models.contrastive.losses import LOSSES
from frozenprefix.models.contrastive.modeling import LockedImageTextModel
from frozenprefix.models.freezing import evaluating
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.utils import progress_bar

BEST_BY = ("text_to_image_recall@10", "image_to_text_recall@10")


def validation_losses(
    model: FrozenPrefixForConditionalGeneration,
    collator: Collator,
    groups: Sequence[ImageGroup],
    images_per_batch: int,
) -> dict[str, float]:
    """Mean loss per trained token over all targets of `groups`.

    Returns:
        `loss` with each target's own images, `shuffled_loss` with the images of other groups. Both are equal for a
        model that ignores its images.

    Raises:
        TrainingError: for fewer than two groups, or samples without an image.
        DataError: if one group contains all images.

    Example:
        >>> from frozenprefix.training import Trainer, validation_losses
        >>> trainer = Trainer(recipe)
        >>> trainer.setup()
        >>> sorted(validation_losses(trainer.model, trainer.collator, trainer.validation_groups, images_per_batch=4))
        ['loss', 'shuffled_loss']
    """
    check_can_be_shuffled(groups)
    swapped = swap_images([group.images for group in groups])
    total = {"loss": 0.0, "shuffled_loss": 0.0}
    tokens = 0
    with evaluating(model), progress_bar("loss of the validation images") as update:
        for start in range(0, len(groups), images_per_batch):
            update(start, len(groups))
            part = groups[start : start + images_per_batch]
            batch = collator(part, [[(s, text) for s in group.samples for text in s.targets] for group in part])
            packed = batch.pop("packed").to(model.device)
            tokens += packed.num_tokens
            others = collator.image_inputs([path for group in part for path in swapped[group.images]])
            for name, images in (("loss", batch), ("shuffled_loss", others)):
                prefix_embeds = model.prefix(**{key: value.to(model.device) for key, value in images.items()})
                total[name] += float(model.packed_loss(packed, prefix_embeds)) * packed.num_tokens
    return {name: value / tokens for name, value in total.items()}


def check_can_be_shuffled(groups: Sequence[ImageGroup]) -> None:
    """Check that validation groups can get other images than their own.

    Raises:
        TrainingError: for fewer than two groups, or samples without an image.

    Example:
        >>> check_can_be_shuffled([])
        Traceback (most recent call last):
        frozenprefix.errors.TrainingError: data.validation: shuffled images need at least 2 images, got 0
    """
    if len(groups) < 2:
        raise TrainingError(f"data.validation: shuffled images need at least 2 images, got {len(groups)}")
    if not all(group.images for group in groups):
        raise TrainingError("data.validation: got samples without an image, which cannot be shuffled")


def batch_bounds(count: int, size: int) -> list[tuple[int, int]]:
    """Bounds of batches of `size`; a last item that would be alone joins the batch before it.

    Example:
        >>> batch_bounds(9, 4)
        [(0, 4), (4, 9)]
    """
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return list(pairwise([*starts, count]))


def embed_by_length(texts: Sequence[str], size: int, embed: Callable[[list[str]], Tensor]) -> Tensor:
    """Embed `size` texts of similar length at a time: float[T, D] in the order of `texts`.

    Example:
        >>> embed_by_length(["ccc", "a"], 1, lambda texts: torch.tensor([[len(text)] for text in texts])).tolist()
        [[3], [1]]
    """
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
    """Loss over batches of images, retrieval metrics over all of them, and the mean Recall@10 as `recall@10`.

    Args:
        images: unit vectors float32[P, D]; texts: float32[T, D]; owner: int64[T], the image of each text.
        bounds: of the batches, as indices into `images`.
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
