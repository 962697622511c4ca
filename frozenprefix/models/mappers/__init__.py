"""Mappers turn image features into prefix embeddings: `mapper(image_features) -> prefix_embeds`.

A mapper is an `nn.Module` with keyword arguments `encoder_dim`, `num_tokens`, `lm_dim`, `prefix_length` and options of
its own, and `forward(image_features: float[B, N, encoder_dim]) -> float[B, prefix_length, lm_dim]`.
"""

from __future__ import annotations

from torch import Tensor, nn

from frozenprefix.errors import ConfigError
from frozenprefix.models.configuration import MapperConfig
from frozenprefix.models.mappers.blocks import PrefixScale
from frozenprefix.models.options import option_problems
from frozenprefix.registry import Registry

MAPPERS: Registry[type[nn.Module]] = Registry(
    "mapper",
    {
        "linear": "frozenprefix.models.mappers.linear:LinearMapper",
        "mlp": "frozenprefix.models.mappers.mlp:MLPMapper",
        "transformer": "frozenprefix.models.mappers.transformer:TransformerMapper",
        "perceiver": "frozenprefix.models.mappers.perceiver:PerceiverMapper",
        "q_former": "frozenprefix.models.mappers.q_former:QFormerMapper",
        "pixel_shuffle": "frozenprefix.models.mappers.pixel_shuffle:PixelShuffleMapper",
        "mapl": "frozenprefix.models.mappers.mapl:MAPLMapper",
        "attention_pool": "frozenprefix.models.mappers.attention_pool:AttentionPoolMapper",
    },
)
STRUCTURAL = {"encoder_dim", "num_tokens", "lm_dim", "prefix_length"}


class PrefixMapper(nn.Module):
    """A mapper followed by the scale that makes its output look like words to the LM."""

    def __init__(self, body: nn.Module, scale: PrefixScale):
        super().__init__()
        self.body = body
        self.scale = scale

    def forward(self, image_features: Tensor) -> Tensor:
        # [B, N, D_enc] -> [B, P, D_lm]
        return self.scale(self.body(image_features))


def build_mapper(
    config: MapperConfig, *, encoder_dim: int, num_tokens: int, lm_dim: int, embedding_rms: float
) -> PrefixMapper:
    """Build the mapper that `config` names.

    Args:
        encoder_dim, num_tokens: width and number of the image tokens.
        lm_dim: width of the LM's embeddings.
        embedding_rms: root mean square of the LM's word embeddings; the prefix starts there.

    Raises:
        ConfigError: for an unknown mapper or wrong options, all of them at once.
    """
    problems = validate_mapper(config)
    if problems:
        raise ConfigError(problems)
    body = MAPPERS.get(config.type)(
        encoder_dim=encoder_dim,
        num_tokens=num_tokens,
        lm_dim=lm_dim,
        prefix_length=config.prefix_length,
        **config.options,
    )
    return PrefixMapper(body, PrefixScale(lm_dim, embedding_rms))


def validate_mapper(config: MapperConfig) -> list[str]:
    """Check the mapper's name and options against its constructor; return one line per problem."""
    return option_problems(MAPPERS, "model.mapper", config.type, config.options, STRUCTURAL)
