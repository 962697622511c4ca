"""Images and texts as vectors of one space, read off the mapper and the language model: FROMAGe (Koh et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frozenprefix.errors import ConfigError
from frozenprefix.models.contrastive.losses import LogitScale
from frozenprefix.models.language_model.loading import positions_from_mask
from frozenprefix.models.peft.adapter_set import AdaptedParts


class ContrastiveHeads(nn.Module):
    """One linear map for images and one for texts into a shared space, and the scale of its cosines.

    Args:
        lm_dim: width of the LM, of whose size both inputs are; dim: of the shared space.
        loss: "infonce" or "sigmoid", for which the scale starts differently.
    """

    def __init__(self, lm_dim: int, dim: int, loss: Any):
        super().__init__()
        self.image = nn.Linear(lm_dim, dim, bias=False)
        self.text = nn.Linear(lm_dim, dim, bias=False)
        self.logit_scale = LogitScale(loss)


class ImageTextEmbedding(AdaptedParts):
    """`encode_image` and `encode_text` for a model that reads images into a language model. A mixin."""

    contrastive: ContrastiveHeads | None

    if TYPE_CHECKING:  # what the model has besides

        def prefix(self, pixel_values: Tensor | None = None, image_features: Tensor | None = None) -> Tensor | None: ...

        def parts(self) -> tuple[nn.Module, nn.Module, float | None]: ...

    @property
    def heads(self) -> ContrastiveHeads:
        if self.contrastive is None:
            raise ConfigError(
                "encode_image and encode_text: this model was trained without a contrastive objective; train it with "
                "objectives.contrastive"
            )
        return self.contrastive

    def encode_image(self, pixel_values: Tensor | None = None, image_features: Tensor | None = None) -> Tensor:
        """Images float[B, 3, H, W], or their features float[B, N, D_enc] -> unit vectors float32[B, dim]."""
        prefix_embeds = self.prefix(pixel_values, image_features)
        if prefix_embeds is None:
            raise ConfigError("encode_image: give pixel_values or image_features, one of the two")
        return self.encode_prefix(prefix_embeds)

    def encode_prefix(self, prefix_embeds: Tensor) -> Tensor:
        """Prefix embeddings float[B, P, D_lm] -> unit vectors float32[B, dim]."""
        return F.normalize(self.heads.image(prefix_embeds.float().mean(dim=1)).float(), dim=-1)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Texts as `processor.tokenizer` gives them, padded on the right and closed by the end token -> unit vectors.

        The vector is made of the LM's last hidden state at the last token. Gradients pass through the LM only where
        something in it is trained.

        Args:
            input_ids: int64[B, T]; attention_mask: int64[B, T], 0 on padding.

        Returns:
            float32[B, dim].
        """
        heads = self.heads
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_text):
            hidden = self.text_states(input_ids, attention_mask)
        last = attention_mask.sum(dim=1) - 1
        ends = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return F.normalize(heads.text(ends.float()).float(), dim=-1)

    def text_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states of texts alone: int64[B, T], int64[B, T] -> float[B, T, D_lm]."""
        decoder = self.parts()[0]
        return decoder(
            # a padding token may have been added to the tokenizer alone, behind the LM's vocabulary
            input_ids=input_ids.masked_fill(attention_mask == 0, 0),
            attention_mask=attention_mask,
            position_ids=positions_from_mask(attention_mask),
            use_cache=False,
        ).last_hidden_state

    @property
    def trains_text(self) -> bool:
        """Whether training changes what the LM computes on text alone."""
        return self.fusion.changes_text or any(p.requires_grad for p in self.language_model.parameters())

    @contextmanager
    def bare_language_model(self) -> Iterator[None]:
        """The LM as it was before any adapter was put into it, inside the block."""
        with self.adapters_disabled(), self.fusion.disabled():
            yield
