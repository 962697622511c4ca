"""Mappers turn image features into prefix embeddings: `mapper(image_features) -> prefix_embeds`.

A mapper is an `nn.Module` whose constructor takes the keyword arguments `encoder_dim`, `num_tokens`, `lm_dim` and
`prefix_length`, and options of its own. Its `forward` maps float[B, num_tokens, encoder_dim] to
float[B, prefix_length, lm_dim]. If it has a method `fit_inputs`, training calls it once, before the first step, with
the features of the training images. A mapper of your own is registered by `@register_mapper("name")` or by an entry
point of the group `frozenprefix.mappers`, or named as `package.module:Class` if `allow_code` was called.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from frozenprefix.errors import ConfigError
from frozenprefix.models.configuration import MapperConfig
from frozenprefix.models.mappers.blocks import PrefixScale
from frozenprefix.models.options import option_problems, register_part
from frozenprefix.registry import Registry, is_external

__all__ = ["MAPPERS", "PrefixMapper", "PrefixScale", "build_mapper", "register_mapper", "validate_mapper"]

M = TypeVar("M", bound=type[nn.Module])

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
    group="frozenprefix.mappers",
    base=nn.Module,
)
STRUCTURAL = {"encoder_dim", "num_tokens", "lm_dim", "prefix_length"}


def register_mapper(name: str) -> Callable[[M], M]:
    """Decorator for a mapper class of your own, which recipes then name: `mapper: {type: NAME, …}`.

    The module with the class has to be imported before such a recipe or checkpoint is read. With an entry point of the
    group `frozenprefix.mappers` in an installed package, this happens by itself.

    Raises:
        ConfigError: for a name that is taken, and a class without the arguments `encoder_dim`, `num_tokens`, `lm_dim`
            and `prefix_length`.

    Example:
        >>> @register_mapper("repeat")
        ... class Repeat(nn.Module):
        ...     def __init__(self, *, encoder_dim, num_tokens, lm_dim, prefix_length, bias: bool = True):
        ...         super().__init__()
        ...         self.length, self.linear = prefix_length, nn.Linear(encoder_dim, lm_dim, bias=bias)
        ...
        ...     def forward(self, image_features):
        ...         return self.linear(image_features.mean(dim=1, keepdim=True)).expand(-1, self.length, -1)
        >>> validate_mapper(MapperConfig(type="repeat", bais=False))
        ["model.mapper.bais: mapper 'repeat' has no such option (did you mean 'bias'?); it has: bias"]
    """
    return register_part(MAPPERS, name, STRUCTURAL)


class PrefixMapper(nn.Sequential):
    """A mapper, followed by the layer norm that brings its output to the size of the LM's word embeddings.

    Args:
        body: the mapper, float[B, N, D_enc] -> float[B, P, D_lm].
        scale: the layer norm, or the identity with `output_norm: none`.

    Example:
        >>> mapper = PrefixMapper(torch.nn.Linear(4, 8), PrefixScale(8, embedding_rms=0.1))
        >>> mapper(torch.randn(2, 3, 4)).shape
        torch.Size([2, 3, 8])
    """

    body: nn.Module
    scale: PrefixScale | nn.Identity

    def __init__(self, body: nn.Module, scale: PrefixScale | nn.Identity):
        super().__init__(OrderedDict(body=body, scale=scale))


def build_mapper(
    config: MapperConfig, *, encoder_dim: int, num_tokens: int, lm_dim: int, embedding_rms: float
) -> PrefixMapper:
    """Build the mapper that `config` names.

    Args:
        encoder_dim: width of the image tokens.
        num_tokens: number of image tokens; 1 for a pooled feature.
        lm_dim: width of the LM's embeddings.
        embedding_rms: root mean square of the LM's word embeddings; the prefix starts with this size.

    Raises:
        ConfigError: for an unknown mapper or wrong options, with all problems at once; and for a mapper from outside
            this package whose output has another shape.

    Example:
        >>> config = MapperConfig(type="mlp", prefix_length=5)
        >>> mapper = build_mapper(config, encoder_dim=16, num_tokens=1, lm_dim=8, embedding_rms=0.1)
        >>> mapper(torch.randn(2, 1, 16)).shape
        torch.Size([2, 5, 8])
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
    if is_external(config.type, "frozenprefix.mappers"):
        _check_shape(config, body, (num_tokens, encoder_dim), lm_dim)
    if config.output_norm == "none":
        _scale_last_layer(body, (num_tokens, encoder_dim), embedding_rms)
        return PrefixMapper(body, nn.Identity())
    return PrefixMapper(body, PrefixScale(lm_dim, embedding_rms))


@torch.no_grad()
def _check_shape(config: MapperConfig, body: nn.Module, shape: tuple[int, int], lm_dim: int) -> None:
    """Refuse a mapper from outside this package whose output would be put into wrong places of the text."""
    training, _ = body.training, body.eval()
    what = f"model.mapper.type: mapper '{config.type}', given image_features of shape {(2, *shape)},"
    expected = (2, config.prefix_length, lm_dim)
    try:
        output = body(torch.zeros(2, *shape))
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise ConfigError(
            f"{what} fails ({type(error).__name__}: {error}); expected an output of {expected}"
        ) from error
    got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if got != expected:
        raise ConfigError(f"{what} gives {got}, expected {expected}: [images, prefix_length, lm_dim]")
    body.train(training)


@torch.no_grad()
def _scale_last_layer(body: nn.Module, shape: tuple[int, int], embedding_rms: float) -> None:
    """Scale the weights of the last layer so that features of unit variance give prefixes of this size.

    A mapper that ends in a residual stream (the transformer of the LM's width) starts with its own size, as in ClipCap.
    """
    last = getattr(body, "output_layer", None)
    if last is None:
        return
    features = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    training, _ = body.training, body.eval()
    factor = embedding_rms / body(features).pow(2).mean().sqrt()
    body.train(training)
    for parameter in last.parameters():
        parameter *= factor


def validate_mapper(config: MapperConfig) -> list[str]:
    """Check the mapper's name and options against its constructor; return one line per problem.

    Example:
        >>> validate_mapper(MapperConfig(type="linear", input_norm=True))
        []
    """
    return option_problems(MAPPERS, "model.mapper", config.type, config.options, STRUCTURAL)
