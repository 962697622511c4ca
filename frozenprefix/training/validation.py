"""Validation loss, with the right pictures and with shuffled ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from frozenprefix.data.collation import Collator
from frozenprefix.data.samples import PictureGroup
from frozenprefix.errors import TrainingError
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration


@torch.no_grad()
def validation_losses(
    model: FrozenPrefixForConditionalGeneration,
    collator: Collator,
    groups: Sequence[PictureGroup],
    pictures_per_batch: int,
) -> dict[str, float]:
    """Mean loss per trained token over all targets of `groups`.

    Returns:
        `loss` with each target's own pictures, `shuffled_loss` with those of another group of its batch. A model that
        has not learned to look gets the same of both.
    """
    if len(groups) < 2:
        raise TrainingError(f"data.validation: shuffled pictures need at least 2 pictures, got {len(groups)}")
    training = model.training
    model.eval()
    total = {"loss": 0.0, "shuffled_loss": 0.0}
    tokens = 0
    for start, end in batch_bounds(len(groups), max(2, pictures_per_batch)):
        part = groups[start:end]
        batch = collator(part, [[(s, text) for s in group.samples for text in s.targets] for group in part])
        packed = batch.pop("packed").to(model.device)
        pictures = {name: value.to(model.device) for name, value in batch.items()}
        prefix_embeds = model.prefix(**pictures)
        if prefix_embeds is None:
            raise TrainingError("data.validation: got samples without a picture, which cannot be shuffled")
        tokens += packed.num_tokens
        total["loss"] += float(model.packed_loss(packed, prefix_embeds)) * packed.num_tokens
        # far enough that a group of several pictures keeps none of its own
        rolled = prefix_embeds.roll(max(len(group.images) for group in part), dims=0)
        total["shuffled_loss"] += float(model.packed_loss(packed, rolled)) * packed.num_tokens
    model.train(training)
    return {name: value / tokens for name, value in total.items()}


def batch_bounds(count: int, size: int) -> list[tuple[int, int]]:
    """Bounds of batches of `size`; a last group that would be alone joins the batch before, to be shuffled with it."""
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return list(pairwise([*starts, count]))
