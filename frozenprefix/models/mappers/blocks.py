"""The pieces that mappers share. Shape letters: B images, N image tokens, P prefix embeddings, D width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frozenprefix.errors import ConfigError


class Attention(nn.Module):
    """Multi-head attention of `queries` over `context` (over themselves when no context is given).

    Args:
        dim: width of the queries and of the result.
        context_dim: width of the context; None is `dim`.
        bias: whether queries, keys and values have one.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dropout: float = 0.0,
        *,
        context_dim: int | None = None,
        bias: bool = False,
    ):
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"mapper: width {dim} must be a multiple of num_heads, got num_heads={num_heads}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_kv = nn.Linear(context_dim or dim, 2 * dim, bias=bias)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, context: Tensor | None = None) -> Tensor:
        key, value = self.to_kv(queries if context is None else context).chunk(2, dim=-1)
        # [B, T, D] -> [B, heads, T, D / heads]
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.to_q(queries), key, value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout if self.training else 0.0)
        return self.to_out(mixed.transpose(1, 2).flatten(2))


def feed_forward(dim: int, ratio: float, activation: type[nn.Module], dropout: float = 0.0) -> nn.Sequential:
    hidden = int(dim * ratio)
    return nn.Sequential(nn.Linear(dim, hidden), activation(), nn.Dropout(dropout), nn.Linear(hidden, dim))


class PrefixScale(nn.Module):
    """Layer norm whose gain starts at the size of the LM's word embeddings.

    A prefix far larger or smaller than words makes the first steps useless: the frozen LM has never seen such input.

    Args:
        lm_dim: width of the LM's embeddings.
        embedding_rms: root mean square of their entries.
    """

    def __init__(self, lm_dim: int, embedding_rms: float):
        super().__init__()
        self.norm = nn.LayerNorm(lm_dim)
        nn.init.constant_(self.norm.weight, embedding_rms)

    def forward(self, prefix_embeds: Tensor) -> Tensor:
        return self.norm(prefix_embeds)


def pool_tokens(image_features: Tensor, length: int) -> Tensor:
    """Average N image tokens, in raster order, into `length` of them: [B, N, D] -> [B, length, D]."""
    if image_features.shape[1] == length:
        return image_features
    return F.adaptive_avg_pool1d(image_features.transpose(1, 2), length).transpose(1, 2)


def learned_tokens(length: int, dim: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(length, dim) * 0.02)
