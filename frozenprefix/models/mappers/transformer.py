"""Transformer mapper: ClipCap (Mokady et al. 2021, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from frozenprefix.errors import ConfigError
from frozenprefix.models.mappers.blocks import Attention, feed_forward, learned_tokens
from frozenprefix.models.options import Count, Dropout, Ratio


class TransformerLayer(nn.Module):
    """Pre-norm transformer layer, float[B, T, D] -> float[B, T, D]."""

    def __init__(self, dim: int, num_heads: int, ratio: float, dropout: float):
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads, dropout)
        self.norm_feed_forward = nn.LayerNorm(dim)
        self.feed_forward = feed_forward(dim, ratio, nn.ReLU, dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        # [B, T, D]
        tokens = tokens + self.attention(self.norm_attention(tokens))
        return tokens + self.feed_forward(self.norm_feed_forward(tokens))


class TransformerMapper(nn.Module):
    """Image tokens and learned queries attend to each other; the transformed queries are the prefix.

    Args:
        encoder_dim, num_tokens, lm_dim, prefix_length: shapes of image features and prefix, as in `build_mapper`.
        hidden_dim: width of the layers; the LM's width by default, as in ClipCap.
        num_layers, num_heads, ratio: of the transformer, as in ClipCap (8, 8, 2.0).
        visual_length: number of tokens that a pooled feature is projected to; `prefix_length` by default. The tokens of
            a patch grid are used as they are, each with a learned position.
        dropout: in attention and feed-forward, in training mode.

    Raises:
        ConfigError: for `visual_length` with a patch grid.

    Example:
        >>> mapper = TransformerMapper(encoder_dim=16, num_tokens=9, lm_dim=8, prefix_length=3, num_layers=1)
        >>> mapper(torch.randn(2, 9, 16)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        *,
        encoder_dim: int,
        num_tokens: int,
        lm_dim: int,
        prefix_length: int,
        hidden_dim: Count | None = None,
        num_layers: Count = 8,
        num_heads: Count = 8,
        ratio: Ratio = 2.0,
        visual_length: Count | None = None,
        dropout: Dropout = 0.0,
    ):
        super().__init__()
        if visual_length is not None and num_tokens > 1:
            raise ConfigError(f"model.mapper.visual_length has no effect on a grid of {num_tokens} tokens; remove it")
        dim = hidden_dim or lm_dim
        unfold = (visual_length or prefix_length) if num_tokens == 1 else 1
        self.visual_length = unfold * num_tokens
        self.project_in = nn.Linear(encoder_dim, unfold * dim)
        self.positions = learned_tokens(num_tokens, dim) if num_tokens > 1 else None
        self.prefix_queries = learned_tokens(prefix_length, dim)
        self.layers = nn.ModuleList(TransformerLayer(dim, num_heads, ratio, dropout) for _ in range(num_layers))
        self.project_out = nn.Linear(dim, lm_dim) if dim != lm_dim else nn.Identity()

    @property
    def output_layer(self) -> nn.Module | None:
        """The layer that gives the prefix its size; None with the LM's width, where that is a residual stream."""
        return self.project_out if isinstance(self.project_out, nn.Linear) else None

    def forward(self, image_features: Tensor) -> Tensor:
        # [B, N, D_enc] -> [B, L, D]
        visual = self.project_in(image_features).flatten(1).unflatten(1, (self.visual_length, -1))
        if self.positions is not None:
            visual = visual + self.positions
        # [B, L + P, D]
        tokens = torch.cat([visual, self.prefix_queries.expand(len(visual), -1, -1).to(visual.dtype)], dim=1)
        for layer in self.layers:
            tokens = layer(tokens)
        # the last P -> [B, P, D_lm]
        return self.project_out(tokens[:, self.visual_length :])
