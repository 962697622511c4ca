"""Validation loss, with the right images and with shuffled ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from frozenprefix.data.collation import Collator
from frozenprefix.data.samples import ImageGroup, swap_images
from frozenprefix.errors import TrainingError
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration


@torch.no_grad()
def validation_losses(
    model: FrozenPrefixForConditionalGeneration,
    collator: Collator,
    groups: Sequence[ImageGroup],
    images_per_batch: int,
) -> dict[str, float]:
    """Mean loss per trained token over all targets of `groups`.

    Returns:
        `loss` with each target's own images, `shuffled_loss` with those of other groups. A model that has not learned
        to look gets the same of both.

    Raises:
        TrainingError: for fewer than two groups, or samples without an image.
        DataError: when one group has all images that there are.
    """
    if len(groups) < 2:
        raise TrainingError(f"data.validation: shuffled images need at least 2 images, got {len(groups)}")
    if not all(group.images for group in groups):
        raise TrainingError("data.validation: got samples without an image, which cannot be shuffled")
    swapped = swap_images([group.images for group in groups])
    training = model.training
    model.eval()
    total = {"loss": 0.0, "shuffled_loss": 0.0}
    tokens = 0
    for start in range(0, len(groups), images_per_batch):
        part = groups[start : start + images_per_batch]
        batch = collator(part, [[(s, text) for s in group.samples for text in s.targets] for group in part])
        packed = batch.pop("packed").to(model.device)
        tokens += packed.num_tokens
        others = collator.image_inputs([path for group in part for path in swapped[group.images]])
        for name, shown in (("loss", batch), ("shuffled_loss", others)):
            prefix_embeds = model.prefix(**{key: value.to(model.device) for key, value in shown.items()})
            total[name] += float(model.packed_loss(packed, prefix_embeds)) * packed.num_tokens
    model.train(training)
    return {name: value / tokens for name, value in total.items()}


def batch_bounds(count: int, size: int) -> list[tuple[int, int]]:
    """Bounds of batches of `size`; a last group that would be alone joins the batch before, for comparison with it."""
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return list(pairwise([*starts, count]))
