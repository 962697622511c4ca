"""Gated residual fusion: the image is mixed into the embedding of every word behind it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frozenprefix.errors import ConfigError
from frozenprefix.models.fusion.base import Fusion
from frozenprefix.models.fusion.cross_attention import MaskedCrossAttention
from frozenprefix.models.options import Count


class ResidualFusion(Fusion):
    """What enters the LM's first layer at a token that is shown an image becomes `e + tanh(gate) * change`.

    The gate, one number per channel, starts at zero: the first step is the bare LM's, bit for bit.

    Args:
        mode: "sum", a weighted sum: the change is `image - e`, with the mean of the prefix embeddings as
            `image`; "product": `image * e`, with that mean normalised; "attention": what the token finds in the
            prefix embeddings by cross-attention.
        num_heads: of mode "attention".
    """

    is_prefix = False
    every_step = True

    def __init__(
        self,
        *,
        lm_dim: int,
        num_layers: int,
        mode: Literal["sum", "product", "attention"] = "sum",
        num_heads: Count | None = None,
    ):
        super().__init__()
        if num_heads is not None and mode != "attention":
            raise ConfigError(f"model.fusion.num_heads: has no effect with mode '{mode}'; remove it")
        heads = num_heads or 8
        if mode == "attention" and lm_dim % heads:
            raise ConfigError(f"model.fusion.num_heads: got {heads}, expected a divisor of the LM's width {lm_dim}")
        self.mode = mode
        self.gate = nn.Parameter(torch.zeros(lm_dim))
        self.attention = MaskedCrossAttention(lm_dim, lm_dim, heads) if mode == "attention" else None

    def attach(self, layers: nn.ModuleList) -> None:
        self.hook_inputs(layers, [0], self.update)

    def update(self, layer: int, hidden: Tensor) -> Tensor:
        assert self.shown is not None
        image = self.shown.image_of(hidden)
        if self.attention is not None:
            change = self.attention(hidden, self.shown.prefix_embeds, image)
        else:
            # [images, D] -> [B, T, D]
            pooled = self.shown.prefix_embeds.mean(dim=1)[image.clamp(min=0)]
            change = pooled - hidden if self.mode == "sum" else F.layer_norm(pooled, pooled.shape[-1:]) * hidden
        return self.gate.tanh() * change * (image >= 0)[..., None]
