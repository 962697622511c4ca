"""Perceiver resampler: Flamingo (Alayrac et al. 2022, section 3.1 and appendix A.1.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from frozenprefix.models.mappers.blocks import Attention, feed_forward, learned_tokens
from frozenprefix.models.options import Count, Ratio


class ResamplerLayer(nn.Module):
    """Latents attend to the image tokens and to themselves: float[B, P, D], float[B, N, D] -> float[B, P, D]."""

    def __init__(self, dim: int, num_heads: int, ratio: float):
        super().__init__()
        self.norm_visual = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.norm_feed_forward = nn.LayerNorm(dim)
        self.feed_forward = feed_forward(dim, ratio, nn.GELU)

    def forward(self, latents: Tensor, visual: Tensor) -> Tensor:
        # [B, P, D]
        queries = self.norm_latents(latents)
        # keys and values: [B, N + P, D]
        context = torch.cat([self.norm_visual(visual), queries], dim=1)
        latents = latents + self.attention(queries, context)
        return latents + self.feed_forward(self.norm_feed_forward(latents))


class PerceiverMapper(nn.Module):
    """P learned latents read the image tokens by cross-attention, in every layer.

    Args:
        encoder_dim, num_tokens, lm_dim, prefix_length: shapes of image features and prefix, as in `build_mapper`.
        hidden_dim: width of the latents; the LM's width by default.
        num_layers, num_heads, ratio: of the resampler; Flamingo has 6 layers and a feed-forward ratio of 4.

    Example:
        >>> mapper = PerceiverMapper(encoder_dim=16, num_tokens=9, lm_dim=8, prefix_length=3, num_layers=1)
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
        num_layers: Count = 6,
        num_heads: Count = 8,
        ratio: Ratio = 4.0,
    ):
        super().__init__()
        dim = hidden_dim or lm_dim
        self.project_in = nn.Linear(encoder_dim, dim)
        self.positions = learned_tokens(num_tokens, dim)
        self.latents = learned_tokens(prefix_length, dim)
        self.layers = nn.ModuleList(ResamplerLayer(dim, num_heads, ratio) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.project_out = nn.Linear(dim, lm_dim)

    @property
    def output_layer(self) -> nn.Module:
        """The layer that gives the prefix its size."""
        return self.project_out

    def forward(self, image_features: Tensor) -> Tensor:
        # [B, N, D_enc] -> [B, N, D]
        visual = self.project_in(image_features) + self.positions
        # [B, P, D]
        latents = self.latents.expand(len(visual), -1, -1).to(visual.dtype)
        for layer in self.layers:
            latents = layer(latents, visual)
        # -> [B, P, D_lm]
        return self.project_out(self.norm(latents))
