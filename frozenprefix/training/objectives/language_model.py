"""Next-token loss of the language model."""

from __future__ import annotations

from torch import Tensor

from frozenprefix.config.objectives import Weight
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.training.objectives.base import Batch, Objective


class NextToken(Objective):
    """Cross-entropy of the target tokens given image and prompt, plus the penalty of AdaLoRA where it is used.

    Example:
        >>> NextToken(model, weight=(1.0, 0.5)).weight
        (1.0, 0.5)
    """

    name = "lm"

    def __init__(self, model: FrozenPrefixForConditionalGeneration, weight: Weight = 1.0):
        super().__init__(weight)
        self.model = model

    def count(self, batch: Batch) -> int:
        return batch["packed"].num_tokens

    def loss(self, batch: Batch, prefix_embeds: Tensor | None) -> Tensor:
        penalty = self.model.adapters.penalty() if self.model.training else 0.0
        return self.model.packed_loss(batch["packed"], prefix_embeds) + penalty
