"""Gated cross-attention between the layers of the frozen LM: Flamingo (Alayrac et al. 2022, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frozenprefix.errors import ConfigError
from frozenprefix.models.fusion.base import Fusion
from frozenprefix.models.options import Count, Ratio


class MaskedCrossAttention(nn.Module):
    """Every token attends to the vectors of the one image that it is shown; a token that is shown none gets zero."""

    def __init__(self, dim: int, inner_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, dim, bias=False)

    def forward(self, hidden: Tensor, prefix_embeds: Tensor, image: Tensor) -> Tensor:
        """float[B, T, D], float[images, P, D], int64[B, T] -> float[B, T, D]."""
        length = prefix_embeds.shape[1]
        # all tokens of the batch are one list of queries, all images one list of keys: [heads, B * T or n * P, d]
        query = self.to_q(self.norm(hidden)).flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
        key, value = (
            part.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
            for part in self.to_kv(prefix_embeds).chunk(2, dim=-1)
        )
        owner = torch.arange(len(prefix_embeds), device=hidden.device).repeat_interleave(length)
        image = image.flatten()
        # a token without an image would see no key at all: it looks at all of them, and what it gets is dropped
        seen = (image[:, None] == owner) | (image[:, None] < 0)
        mixed = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=seen)[0]
        mixed = mixed.transpose(0, 1).flatten(1) * (image[:, None] >= 0)
        return self.to_out(mixed).view_as(hidden)


class GatedBlock(nn.Module):
    """Cross-attention and a feed-forward part, each behind a gate that starts closed."""

    def __init__(self, dim: int, inner_dim: int, num_heads: int, ratio: float):
        super().__init__()
        self.attention = MaskedCrossAttention(dim, inner_dim, num_heads)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, int(dim * ratio)), nn.GELU(), nn.Linear(int(dim * ratio), dim)
        )
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, prefix_embeds: Tensor, image: Tensor) -> Tensor:
        """What is added to float[B, T, D]."""
        attended = self.attention_gate.tanh() * self.attention(hidden, prefix_embeds, image)
        after = hidden + attended
        shown = (image >= 0)[..., None]
        return attended + self.feed_forward_gate.tanh() * self.feed_forward(after) * shown


class CrossAttentionFusion(Fusion):
    """Before every `every`-th layer, tokens look at the latest image before them.

    With closed gates, as at the start, the LM computes bit for bit what it computes without.

    Args:
        every: layers between two blocks; Flamingo-3B has one before each, the larger ones before every 4th or 7th.
        num_heads, head_dim: of the cross-attention.
        ratio: width of the feed-forward part over the LM's; Flamingo has 4.
    """

    is_prefix = False
    every_step = True

    def __init__(
        self,
        *,
        lm_dim: int,
        num_layers: int,
        every: Count = 4,
        num_heads: Count = 8,
        head_dim: Count = 64,
        ratio: Ratio = 4.0,
    ):
        super().__init__()
        if every > num_layers:
            raise ConfigError(f"model.fusion.every: got {every}, expected at most {num_layers}, the LM's layers")
        self.numbers = list(range(every - 1, num_layers, every))
        self.blocks = nn.ModuleList(GatedBlock(lm_dim, num_heads * head_dim, num_heads, ratio) for _ in self.numbers)

    def attach(self, layers: nn.ModuleList) -> None:
        self.hook_inputs(layers, self.numbers, self.update)

    def update(self, layer: int, hidden: Tensor) -> Tensor:
        assert self.shown is not None
        block = self.blocks[self.numbers.index(layer)]
        return block(hidden, self.shown.prefix_embeds, self.shown.image_of(hidden))
