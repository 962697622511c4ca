"""Gated residual fusion: the image is added to the embedding of every word after it."""

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
    """The embedding `e` of a token that sees an image becomes `e + tanh(gate) * change`.

    The gate, one number per channel, starts at zero, so the first step is the bare LM's, bit for bit.

    Args:
        lm_dim, num_layers: width and number of the LM's layers.
        mode: "sum": the change is `image - e`, with the mean of the prefix embeddings as `image`, so that the result is
            a weighted sum. "product": `image * e`, with that mean normalized. "attention": cross-attention of
            the token to the prefix embeddings.
        num_heads: of mode "attention"; 8 by default.

    Raises:
        ConfigError: for `num_heads` without effect, or that does not divide the LM's width.

    Example:
        >>> ResidualFusion(lm_dim=8, num_layers=2).gate.abs().sum().item()
        0.0
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
        """float[B, T, D]: the update of the embeddings before the first layer."""
        assert self.context is not None
        image = self.context.image_of(hidden)
        if self.attention is not None:
            change = self.attention(hidden, self.context.prefix_embeds, image)
        else:
            # [images, P, D] -> [images, D] -> [B, T, D]
            pooled = self.context.prefix_embeds.mean(dim=1)[image.clamp(min=0)]
            change = pooled - hidden if self.mode == "sum" else F.layer_norm(pooled, pooled.shape[-1:]) * hidden
        return self.gate.tanh() * change * (image >= 0)[..., None]
