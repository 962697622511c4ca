"""Transformer mapper: ClipCap (Mokady et al. 2021, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from frozenprefix.errors import ConfigError
from frozenprefix.models.mappers.blocks import Attention, feed_forward, learned_tokens
from frozenprefix.models.options import Count, Dropout, Ratio


class TransformerLayer(nn.Module):
    def __init__(self, dim: int, num_heads: int, ratio: float, dropout: float):
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads, dropout)
        self.norm_feed_forward = nn.LayerNorm(dim)
        self.feed_forward = feed_forward(dim, ratio, nn.ReLU, dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm_attention(tokens))
        return tokens + self.feed_forward(self.norm_feed_forward(tokens))


class TransformerMapper(nn.Module):
    """Learned prefix queries and image tokens attend to each other; the queries come out as the prefix.

    Args:
        hidden_dim: width of the layers; None is the LM's own, as in ClipCap.
        num_layers, num_heads, ratio: as in ClipCap (8, 8, 2.0).
        visual_length: tokens that a pooled feature is unfolded into; None is `prefix_length`. A patch grid's tokens are
            taken as they are, with a learned position each.
        dropout: in attention and feed-forward, while training.
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
