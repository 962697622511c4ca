"""Attention pooling: CoCa's attentional pooler (Yu et al. 2022, section 3.2)."""

from __future__ import annotations

from torch import Tensor, nn

from frozenprefix.errors import ConfigError
from frozenprefix.models.mappers.blocks import Attention, learned_tokens
from frozenprefix.models.options import Count


class AttentionPoolMapper(nn.Module):
    """P learned queries read the image tokens in one multi-head attention, followed by a linear layer.

    Queries and image tokens are normalized first, as in CoCa. The queries do not see each other. So there have to be
    several image tokens: from a single one every query would read the same.

    Args:
        encoder_dim, num_tokens, lm_dim, prefix_length: shapes of image features and prefix, as in `build_mapper`.
        hidden_dim: width of the attention; the LM's width by default.
        num_heads: 8 as in open_clip's CoCa.

    Raises:
        ConfigError: for a pooled feature.

    Example:
        >>> mapper = AttentionPoolMapper(encoder_dim=16, num_tokens=9, lm_dim=8, prefix_length=3)
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
        num_heads: Count = 8,
    ):
        super().__init__()
        if num_tokens == 1:
            raise ConfigError(
                "model.mapper.type: 'attention_pool' has nothing to choose from in a pooled feature; set "
                "model.vision_encoder.output=patch, or use mapper 'mlp'"
            )
        dim = hidden_dim or lm_dim
        self.queries = learned_tokens(prefix_length, dim)
        self.norm_queries = nn.LayerNorm(dim)
        self.norm_visual = nn.LayerNorm(encoder_dim)
        self.attention = Attention(dim, num_heads, context_dim=encoder_dim, bias=True)
        self.project_out = nn.Linear(dim, lm_dim)

    @property
    def output_layer(self) -> nn.Module:
        """The layer that gives the prefix its size."""
        return self.project_out

    def forward(self, image_features: Tensor) -> Tensor:
        # [B, N, D_enc]
        visual = self.norm_visual(image_features)
        # [B, P, D]
        queries = self.norm_queries(self.queries).expand(len(visual), -1, -1)
        # -> [B, P, D_lm]
        return self.project_out(self.attention(queries, visual))
