"""Q-Former: BLIP-2 (Li et al. 2023, section 3.1)."""

from __future__ import annotations

from torch import Tensor, nn

from frozenprefix.models.mappers.blocks import Attention, feed_forward, learned_tokens
from frozenprefix.models.options import Count, Dropout, Ratio


class QFormerLayer(nn.Module):
    """A BERT layer for queries: attention to each other, in some layers to the image tokens, feed-forward.

    Post-norm as in BERT: the layer norm stands behind each residual sum.

    Args:
        encoder_dim: width of the image tokens; None for a layer that does not look at them.
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
        queries = self.norm_attention(queries + self.attention(queries))
        if self.cross_attention is not None:
            queries = self.norm_cross_attention(queries + self.cross_attention(queries, visual))
        return self.norm_feed_forward(queries + self.feed_forward(queries))


class QFormerMapper(nn.Module):
    """P learned queries read the image tokens in every second layer of a BERT; a linear layer leads to the LM.

    What of BLIP-2's Q-Former serves its text side (word embeddings, the text's feed-forward layers, heads) is left
    out; with it the published 188M parameters come out. Image tokens get no positions here, as there: the encoder's
    own must do. BLIP-2 starts from BERT's weights, this mapper from random ones.

    Args:
        hidden_dim, num_layers, num_heads, ratio: as in BERT-base (768, 12, 12, 4.0).
        cross_attention_every: layers 0, k, 2k, … look at the image; 2 in BLIP-2.
        input_norm: layer norm on the features, for encoders whose features are not normalised.
        dropout: in attention and feed-forward, while training; BLIP-2 has 0.1.
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
        self.layers = nn.ModuleList(
            QFormerLayer(hidden_dim, None if number % cross_attention_every else encoder_dim, num_heads, ratio, dropout)
            for number in range(num_layers)
        )
        self.project_out = nn.Linear(hidden_dim, lm_dim)

    def forward(self, image_features: Tensor) -> Tensor:
        # [B, N, D_enc]
        visual = self.input_norm(image_features)
        # [B, P, D]
        queries = self.norm_queries(self.queries).expand(len(visual), -1, -1).to(visual.dtype)
        for layer in self.layers:
            queries = layer(queries, visual)
        # -> [B, P, D_lm]
        return self.project_out(queries)
