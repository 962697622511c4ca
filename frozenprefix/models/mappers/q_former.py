"""Q-Former: BLIP-2 (Li et al. 2023, section 3.1)."""

from __future__ import annotations

from torch import Tensor, nn

from frozenprefix.models.mappers.blocks import Attention, feed_forward, learned_tokens
from frozenprefix.models.options import Count, Dropout, Ratio


class QFormerLayer(nn.Module):
    """BERT layer over queries: self-attention, in some layers cross-attention to the image tokens, feed-forward.

    It is post-norm, as in BERT: the layer norm follows each residual sum.

    Args:
        dim, num_heads, ratio, dropout: of the layer.
        encoder_dim: width of the image tokens; None for a layer without cross-attention.
    """

    def __init__(self, dim: int, encoder_dim: int | None, num_heads: int, ratio: float, dropout: float):
        super().__init__()
        self.attention = Attention(dim, num_heads, dropout, bias=True)
        self.norm_attention = nn.LayerNorm(dim)
        self.cross_attention = None
        if encoder_dim is not None:
            self.cross_attention = Attention(dim, num_heads, dropout, context_dim=encoder_dim, bias=True)
            self.norm_cross_attention = nn.LayerNorm(dim)
        self.feed_forward = feed_forward(dim, ratio, nn.GELU, dropout)
        self.norm_feed_forward = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, visual: Tensor) -> Tensor:
        # [B, P, D], [B, N, D_enc] -> [B, P, D]
        queries = self.norm_attention(queries + self.attention(queries))
        if self.cross_attention is not None:
            queries = self.norm_cross_attention(queries + self.cross_attention(queries, visual))
        return self.norm_feed_forward(queries + self.feed_forward(queries))


class QFormerMapper(nn.Module):
    """A BERT over P learned queries, every second layer of which reads the image tokens, and a linear layer.

    The parts of BLIP-2's Q-Former that only its text side uses (word embeddings, feed-forward layers for text, heads)
    are left out; with them it has the published 188 M parameters. As in BLIP-2, image tokens get no positions beyond
    the encoder's own. BLIP-2 starts from BERT's weights, this mapper from random ones.

    Args:
        encoder_dim, num_tokens, lm_dim, prefix_length: shapes of image features and prefix, as in `build_mapper`.
        hidden_dim, num_layers, num_heads, ratio: as in BERT-base (768, 12, 12, 4.0).
        cross_attention_every: layers 0, k, 2k, … read the image; 2 in BLIP-2.
        input_norm: layer norm on the features, for encoders whose features are not normalized.
        dropout: in attention and feed-forward, in training mode; BLIP-2 has 0.1.

    Example:
        >>> shapes = {"encoder_dim": 16, "num_tokens": 9, "lm_dim": 8, "prefix_length": 3}
        >>> mapper = QFormerMapper(**shapes, hidden_dim=32, num_layers=2, num_heads=4)
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
        hidden_dim: Count = 768,
        num_layers: Count = 12,
        num_heads: Count = 12,
        ratio: Ratio = 4.0,
        cross_attention_every: Count = 2,
        input_norm: bool = False,
        dropout: Dropout = 0.0,
    ):
        super().__init__()
        self.input_norm = nn.LayerNorm(encoder_dim) if input_norm else nn.Identity()
        self.queries = learned_tokens(prefix_length, hidden_dim)
        self.norm_queries = nn.LayerNorm(hidden_dim)
        layers = []
        for number in range(num_layers):
            context_dim = None if number % cross_attention_every else encoder_dim
            layers.append(QFormerLayer(hidden_dim, context_dim, num_heads, ratio, dropout))
        self.layers = nn.ModuleList(layers)
        self.project_out = nn.Linear(hidden_dim, lm_dim)

    @property
    def output_layer(self) -> nn.Module:
        """The layer that gives the prefix its size."""
        return self.project_out

    def forward(self, image_features: Tensor) -> Tensor:
        # [B, N, D_enc]
        visual = self.input_norm(image_features)
        # [B, P, D]
        queries = self.norm_queries(self.queries).expand(len(visual), -1, -1).to(visual.dtype)
        for layer in self.layers:
            queries = layer(queries, visual)
        # -> [B, P, D_lm]
        return self.project_out(queries)
