"""Linear mapper: Frozen (Tsimpoukelli et al. 2021, section 3.1) and LiMBeR (Merullo et al. 2023, section 3)."""

from __future__ import annotations

from torch import Tensor, nn

from frozenprefix.models.mappers.blocks import pool_tokens


class LinearMapper(nn.Module):
    """One linear layer.

    From a pooled feature it computes all P embeddings at once (Frozen). In a patch grid it maps each token to one
    embedding (LiMBeR); a grid with more tokens than the prefix is averaged first, in raster order.

    Args:
        encoder_dim, num_tokens, lm_dim, prefix_length: shapes of image features and prefix, as in `build_mapper`.
        input_norm: layer norm on the features, for encoders whose features are not normalized.

    Example:
        >>> mapper = LinearMapper(encoder_dim=16, num_tokens=9, lm_dim=8, prefix_length=3)
        >>> mapper(torch.randn(2, 9, 16)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, *, encoder_dim: int, num_tokens: int, lm_dim: int, prefix_length: int, input_norm: bool = False):
        super().__init__()
        self.prefix_length = prefix_length
        self.tokens_out = prefix_length if num_tokens == 1 else 1
        self.input_norm = nn.LayerNorm(encoder_dim) if input_norm else nn.Identity()
        self.project = nn.Linear(encoder_dim, self.tokens_out * lm_dim)

    @property
    def output_layer(self) -> nn.Module:
        """The layer that gives the prefix its size."""
        return self.project

    def forward(self, image_features: Tensor) -> Tensor:
        # [B, N, D_enc] -> [B, 1 or P, D_enc]
        tokens = self.input_norm(image_features)
        tokens = tokens if self.tokens_out > 1 else pool_tokens(tokens, self.prefix_length)
        # -> [B, P, D_lm]
        return self.project(tokens).flatten(1).unflatten(1, (self.prefix_length, -1))
