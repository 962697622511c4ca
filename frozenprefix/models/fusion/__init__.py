"""Fusions: how the mapper's output enters the frozen language model.

A fusion is a `Fusion`, an `nn.Module` whose constructor takes the keyword arguments `lm_dim` and `num_layers`, and
options of its own. It holds the parameters that it trains. In the language model it registers hooks but no parameters,
so that the LM's tensors stay as they are. A fusion of your own is registered by `@register_fusion("name")` or by an
entry point of the group `frozenprefix.fusions`, or named as `package.module:Class` if `allow_code` was called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from transformers import PreTrainedModel

from frozenprefix.errors import ConfigError
from frozenprefix.models.configuration import FusionConfig
from frozenprefix.models.fusion.base import Fusion, ImageContext, decoder_layers
from frozenprefix.models.fusion.placeholders import fuse, fuse_prefix, index_placeholders
from frozenprefix.models.options import option_problems, register_part
from frozenprefix.registry import Registry

__all__ = [
    "FUSIONS",
    "Fusion",
    "ImageContext",
    "build_fusion",
    "fuse",
    "fuse_prefix",
    "index_placeholders",
    "register_fusion",
    "validate_fusion",
]

FUSIONS: Registry[Any] = Registry(
    "fusion",
    {
        "prefix": "frozenprefix.models.fusion.prefix:PrefixFusion",
        "deep_prefix": "frozenprefix.models.fusion.deep_prefix:DeepPrefixFusion",
        "cross_attention": "frozenprefix.models.fusion.cross_attention:CrossAttentionFusion",
        "adapters": "frozenprefix.models.fusion.adapters:AdapterFusion",
        "residual": "frozenprefix.models.fusion.residual:ResidualFusion",
    },
    group="frozenprefix.fusions",
    base=Fusion,
)
STRUCTURAL = {"lm_dim", "num_layers"}
_FOR_ENCODER_DECODER = ("prefix", "deep_prefix")
F = TypeVar("F", bound=type[Fusion])


def register_fusion(name: str) -> Callable[[F], F]:
    """Decorator for a fusion of your own, which recipes then name: `fusion: {type: NAME, …}`; see `register_mapper`.

    Raises:
        ConfigError: for a name that is taken, and for what is no `Fusion` that takes `lm_dim` and `num_layers`.

    Example:
        >>> from frozenprefix.models.fusion.prefix import PrefixFusion
        >>> @register_fusion("quiet_prefix")
        ... class QuietPrefix(PrefixFusion):
        ...     def __init__(self, *, lm_dim, num_layers, loudness: float = 0.5):
        ...         super().__init__(lm_dim=lm_dim, num_layers=num_layers)
        >>> validate_fusion(FusionConfig(type="quiet_prefix", loudness=0.1))
        []
    """
    return register_part(FUSIONS, name, STRUCTURAL)


def build_fusion(config: FusionConfig, language_model: PreTrainedModel, lm_dim: int) -> Fusion:
    """Build the fusion that `config` names, and register its hooks in `language_model`.

    Args:
        lm_dim: width of the LM's embeddings.

    Raises:
        ConfigError: for an unknown fusion, wrong options, or an LM that does not fit.

    Example:
        >>> build_fusion(FusionConfig(type="prefix"), model.language_model, lm_dim=32).is_prefix
        True
    """
    problems = validate_fusion(config)
    if problems:
        raise ConfigError(problems)
    if language_model.config.is_encoder_decoder and config.type not in _FOR_ENCODER_DECODER:
        raise ConfigError(
            f"model.fusion.type: got '{config.type}', expected {' or '.join(_FOR_ENCODER_DECODER)} with an encoder-"
            f"decoder language model ({type(language_model).__name__}), whose encoder reads the image"
        )
    layers = decoder_layers(language_model)
    fusion: Fusion = FUSIONS.get(config.type)(lm_dim=lm_dim, num_layers=len(layers), **config.options)
    fusion.attach(layers)
    return fusion


def validate_fusion(config: FusionConfig) -> list[str]:
    """Check the fusion's name and options against its constructor; return one line per problem.

    Example:
        >>> validate_fusion(FusionConfig(type="cross_attention", every=2))
        []
    """
    return option_problems(FUSIONS, "model.fusion", config.type, config.options, STRUCTURAL)
