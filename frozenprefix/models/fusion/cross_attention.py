"""Gated cross-attention between the layers of the frozen LM: Flamingo (Alayrac et al. 2022, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frozenprefix.errors import ConfigError
from frozenprefix.models.fusion.base import Fusion
from frozenprefix.models.options import Count, Ratio


class MaskedCrossAttention(nn.Module):
    """Every token attends to the prefix embeddings of the one image that it sees; without an image the result is zero.

    Example:
        >>> attention = MaskedCrossAttention(8, inner_dim=8, num_heads=2)
        >>> image = torch.tensor([[-1, 0, 1]])  # no image, the first, the second
        >>> attention(torch.randn(1, 3, 8), torch.randn(2, 4, 8), image)[0, 0].abs().sum().item()
        0.0
    """

    def __init__(self, dim: int, inner_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, dim, bias=False)

    def forward(self, hidden: Tensor, prefix_embeds: Tensor, image: Tensor) -> Tensor:
        """float[B, T, D], float[images, P, D], int64[B, T] -> float[B, T, D]."""
        # All tokens of the batch are one list of queries, all images one list of keys.
        # [B, T, D] -> [heads, B * T, d]
        query = self._split_heads(self.to_q(self.norm(hidden)))
        # [images, P, D] -> [heads, images * P, d]
        key, value = map(self._split_heads, self.to_kv(prefix_embeds).chunk(2, dim=-1))
        owner = torch.arange(len(prefix_embeds), device=hidden.device).repeat_interleave(prefix_embeds.shape[1])
        image = image.flatten()
        # A token without an image attends to all images, because a softmax over no keys is not a number; its result is
        # set to zero. [B * T, images * P]
        visible = (image[:, None] == owner) | (image[:, None] < 0)
        mixed = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=visible)[0]
        # [heads, B * T, d] -> [B * T, heads * d] -> [B, T, D]
        mixed = mixed.transpose(0, 1).flatten(1) * (image[:, None] >= 0)
        return self.to_out(mixed).view_as(hidden)

    def _split_heads(self, tokens: Tensor) -> Tensor:
        """[A, T, heads * d] -> [heads, A * T, d]."""
        return tokens.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)


class GatedBlock(nn.Module):
    """Cross-attention and a feed-forward part, each with a gate that starts closed."""

    def __init__(self, dim: int, inner_dim: int, num_heads: int, ratio: float):
        super().__init__()
        self.attention = MaskedCrossAttention(dim, inner_dim, num_heads)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        hidden_dim = int(dim * ratio)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim)
        )
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, prefix_embeds: Tensor, image: Tensor) -> Tensor:
        """The update of `hidden`: float[B, T, D], float[images, P, D], int64[B, T] -> float[B, T, D]."""
        attended = self.attention_gate.tanh() * self.attention(hidden, prefix_embeds, image)
        has_image = (image >= 0)[..., None]
        return attended + self.feed_forward_gate.tanh() * self.feed_forward(hidden + attended) * has_image


class CrossAttentionFusion(Fusion):
    """Before every `every`-th layer, tokens attend to the latest image before them.

    The gates start closed, so that the LM's first output equals that without the fusion, bit for bit.

    Args:
        lm_dim, num_layers: width and number of the LM's layers.
        every: layers per block; Flamingo-3B has a block before each layer, the larger models before every 4th or 7th.
        num_heads, head_dim: of the cross-attention.
        ratio: width of the feed-forward part divided by the LM's; 4 in Flamingo.

    Raises:
        ConfigError: if `every` is larger than `num_layers`.

    Example:
        >>> CrossAttentionFusion(lm_dim=8, num_layers=6, every=2, num_heads=2, head_dim=4).numbers
        [1, 3, 5]
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
        """float[B, T, D]: the update of the hidden states before `layer`."""
        assert self.context is not None
        block = self.blocks[self.numbers.index(layer)]
        return block(hidden, self.context.prefix_embeds, self.context.image_of(hidden))
