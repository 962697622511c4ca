"""Validation loss, with the right pictures and with shuffled ones."""

from __future__ import annotations

from collections.abc import Sequence

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
        `loss` with each target's own pictures, `shuffled_loss` with those of the next group of its batch. A model that
        has not learned to look gets the same of both.
    """
    if len(groups) < 2:
        raise TrainingError(f"data.validation: shuffled pictures need at least 2 pictures, got {len(groups)}")
    training = model.training
    model.eval()
    total = {"loss": 0.0, "shuffled_loss": 0.0}
    tokens = 0
    size = max(2, pictures_per_batch)
    starts = range(0, len(groups), size)
    for start in starts:
        part = list(groups[start : start + size])
        if len(part) == 1:  # a lone last picture is shown its predecessor
            part = [groups[start - 1], *part]
        batch = collator(part, [[(s, text) for s in group.samples for text in s.targets] for group in part])
        packed = batch.pop("packed").to(model.device)
        pictures = {name: value.to(model.device) for name, value in batch.items()}
        prefix_embeds = model.prefix(**pictures)
        tokens += packed.num_tokens
        total["loss"] += float(model.packed_loss(packed, prefix_embeds)) * packed.num_tokens
        rolled = prefix_embeds.roll(1, dims=0)
        total["shuffled_loss"] += float(model.packed_loss(packed, rolled)) * packed.num_tokens
    model.train(training)
    return {name: value / tokens for name, value in total.items()}
