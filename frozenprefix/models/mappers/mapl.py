"""MAPL: a small transformer with a bottleneck (Mañas et al. 2022, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from frozenprefix.models.mappers.blocks import learned_tokens
from frozenprefix.models.mappers.transformer import TransformerLayer
from frozenprefix.models.options import Count, Dropout, Ratio


class MAPLMapper(nn.Module):
    """A narrow transformer over projected image tokens and learned queries; the queries are projected up to the LM.

    With CLIP ViT-L/14, GPT-J and 32 queries it has the paper's 3.4 M parameters to within 0.1 %; the projections to
    queries, keys and values have no bias here. The queries start with a standard deviation of 0.02 instead of 1. As in
    MAPL, image tokens get no positions beyond the encoder's own.

    Args:
        encoder_dim, num_tokens, lm_dim, prefix_length: shapes of image features and prefix, as in `build_mapper`.
        hidden_dim, num_layers, num_heads, ratio: of the transformer, as in MAPL (256, 4, 8, 2.0).
        dropout: in attention and feed-forward, in training mode; MAPL has none.

    Example:
        >>> mapper = MAPLMapper(encoder_dim=16, num_tokens=9, lm_dim=8, prefix_length=3, hidden_dim=32)
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
        hidden_dim: Count = 256,
        num_layers: Count = 4,
        num_heads: Count = 8,
        ratio: Ratio = 2.0,
        dropout: Dropout = 0.0,
    ):
        super().__init__()
        self.num_tokens = num_tokens
        self.project_in = nn.Linear(encoder_dim, hidden_dim)
        self.queries = learned_tokens(prefix_length, hidden_dim)
        self.layers = nn.ModuleList(TransformerLayer(hidden_dim, num_heads, ratio, dropout) for _ in range(num_layers))
        self.project_out = nn.Linear(hidden_dim, lm_dim)

    @property
    def output_layer(self) -> nn.Module:
        """The layer that gives the prefix its size."""
        return self.project_out

    def forward(self, image_features: Tensor) -> Tensor:
        # [B, N, D_enc] -> [B, N, D]
        visual = self.project_in(image_features)
        # [B, N + P, D]
        tokens = torch.cat([visual, self.queries.expand(len(visual), -1, -1).to(visual.dtype)], dim=1)
        for layer in self.layers:
            tokens = layer(tokens)
        # the last P -> [B, P, D_lm]
        return self.project_out(tokens[:, self.num_tokens :])
