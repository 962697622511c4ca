"""Next-token loss of the language model."""

from __future__ import annotations

from torch import Tensor

from frozenprefix.config.objectives import Weight
from frozenprefix.errors import ConfigError
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.training.objectives.base import Batch, Objective


class NextToken(Objective):
    """Cross-entropy of the target tokens given image and prompt, plus the penalty of AdaLoRA where it is used.

    Args:
        label_smoothing, word_dropout: as of the model's `packed_loss`; validation has neither.

    Example:
        >>> NextToken(model, weight=(1.0, 0.5)).weight
        (1.0, 0.5)
    """

    name = "lm"

    def __init__(
        self,
        model: FrozenPrefixForConditionalGeneration,
        weight: Weight = 1.0,
        *,
        label_smoothing: float = 0.0,
        word_dropout: float = 0.0,
    ):
        super().__init__(weight)
        self.model = model
        self.noise = {"label_smoothing": label_smoothing, "word_dropout": word_dropout}
        if word_dropout and model.lm.is_encoder_decoder:
            raise ConfigError(
                f"training.word_dropout: got {word_dropout:g}, expected 0 with {model.lm.name}: the words that an "
                "encoder-decoder model writes are not read with the image"
            )

    def count(self, batch: Batch) -> int:
        return batch["packed"].num_tokens

    def loss(self, batch: Batch, prefix_embeds: Tensor | None) -> Tensor:
        penalty = self.model.adapters.penalty() if self.model.training else 0.0
        return self.model.packed_loss(batch["packed"], prefix_embeds, **self.noise) + penalty
