"""Fusions: how the mapper's output enters the frozen language model.

A fusion is an `nn.Module` with keyword arguments `lm_dim`, `num_layers` and options of its own. What
it trains is its own; in the language model it leaves hooks only, never parameters, so that the LM's tensors stay as
they are. See `base.Fusion`.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from frozenprefix.errors import ConfigError
from frozenprefix.models.configuration import FusionConfig
from frozenprefix.models.fusion.base import Fusion, Shown, decoder_layers
from frozenprefix.models.fusion.placeholders import fuse_prefix, index_placeholders
from frozenprefix.models.options import option_problems
from frozenprefix.registry import Registry

__all__ = ["FUSIONS", "Fusion", "Shown", "build_fusion", "fuse_prefix", "index_placeholders", "validate_fusion"]

FUSIONS: Registry[Any] = Registry(
    "fusion",
    {
        "prefix": "frozenprefix.models.fusion.prefix:PrefixFusion",
        "deep_prefix": "frozenprefix.models.fusion.deep_prefix:DeepPrefixFusion",
        "cross_attention": "frozenprefix.models.fusion.cross_attention:CrossAttentionFusion",
        "adapters": "frozenprefix.models.fusion.adapters:AdapterFusion",
        "residual": "frozenprefix.models.fusion.residual:ResidualFusion",
    },
)

_IN_AN_ENCODER = ("prefix", "deep_prefix")


def build_fusion(config: FusionConfig, language_model: PreTrainedModel, lm_dim: int) -> Fusion:
    """Build the fusion that `config` names, hooked into `language_model`.

    Raises:
        ConfigError: for an unknown fusion, wrong options, or an LM that it cannot be built into.
    """
    problems = validate_fusion(config)
    if problems:
        raise ConfigError(problems)
    if language_model.config.is_encoder_decoder and config.type not in _IN_AN_ENCODER:
        raise ConfigError(
            f"model.fusion.type: got '{config.type}', expected {' or '.join(_IN_AN_ENCODER)} with an encoder-decoder "
            f"language model ({type(language_model).__name__}), whose encoder reads the image"
        )
    layers = decoder_layers(language_model)
    fusion: Fusion = FUSIONS.get(config.type)(lm_dim=lm_dim, num_layers=len(layers), **config.options)
    fusion.attach(layers)
    return fusion


def validate_fusion(config: FusionConfig) -> list[str]:
    """Check the fusion's name and options against its constructor; return one line per problem."""
    return option_problems(FUSIONS, "model.fusion", config.type, config.options, {"lm_dim", "num_layers"})
