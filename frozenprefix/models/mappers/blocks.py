"""Parts that mappers share. Shape letters: B images, N image tokens, P prefix embeddings, D width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frozenprefix.errors import ConfigError


class Attention(nn.Module):
    """Multi-head attention of queries to a context, or to themselves if no context is given.

    Args:
        dim: width of the queries and of the result.
        num_heads: a divisor of `dim`.
        dropout: on the attention weights, in training mode.
        context_dim: width of the context; `dim` by default.
        bias: whether the projections to queries, keys and values have a bias.

    Raises:
        ConfigError: if `num_heads` does not divide `dim`.

    Example:
        >>> attention = Attention(8, num_heads=2, context_dim=6)
        >>> attention(torch.randn(1, 3, 8), torch.randn(1, 5, 6)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(
        self, dim: int, num_heads: int, dropout: float = 0.0, *, context_dim: int | None = None, bias: bool = False
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
        # [B, T, D] and [B, S, D_context] -> [B, T or S, D] each
        key, value = self.to_kv(queries if context is None else context).chunk(2, dim=-1)
        # [B, T or S, D] -> [B, heads, T or S, D / heads]
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.to_q(queries), key, value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout if self.training else 0.0)
        # [B, heads, T, D / heads] -> [B, T, D]
        return self.to_out(mixed.transpose(1, 2).flatten(2))


def feed_forward(dim: int, ratio: float, activation: type[nn.Module], dropout: float = 0.0) -> nn.Sequential:
    """Feed-forward part of a transformer layer, float[..., dim] -> float[..., dim], with `dim * ratio` hidden units."""
    hidden = int(dim * ratio)
    return nn.Sequential(nn.Linear(dim, hidden), activation(), nn.Dropout(dropout), nn.Linear(hidden, dim))


class PrefixScale(nn.Module):
    """Layer norm whose gain starts at the size of the LM's word embeddings.

    With a prefix much larger or smaller than words the first steps are wasted: the frozen LM has never seen such input.

    Args:
        lm_dim: width of the LM's embeddings.
        embedding_rms: root mean square of their entries.

    Example:
        >>> PrefixScale(8, embedding_rms=0.1)(torch.randn(1, 3, 8)).square().mean().sqrt().round(decimals=2)
        tensor(0.1000, grad_fn=<RoundBackward1>)
    """

    def __init__(self, lm_dim: int, embedding_rms: float):
        super().__init__()
        self.norm = nn.LayerNorm(lm_dim)
        nn.init.constant_(self.norm.weight, embedding_rms)

    def forward(self, prefix_embeds: Tensor) -> Tensor:
        # [B, P, D_lm]
        return self.norm(prefix_embeds)


def pool_tokens(image_features: Tensor, length: int) -> Tensor:
    """Average image tokens, in raster order, to `length` tokens: float[B, N, D] -> float[B, length, D].

    Example:
        >>> pool_tokens(torch.tensor([[[1.0], [3.0], [5.0], [7.0]]]), 2).flatten().tolist()
        [2.0, 6.0]
    """
    if image_features.shape[1] == length:
        return image_features
    return F.adaptive_avg_pool1d(image_features.transpose(1, 2), length).transpose(1, 2)


def learned_tokens(length: int, dim: int) -> nn.Parameter:
    """Learned vectors, float[length, dim], with a standard deviation of 0.02 at the start."""
    return nn.Parameter(torch.randn(length, dim) * 0.02)
