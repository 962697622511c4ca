"""Mappers as the two-layer MLP with GELU that other engines have, where that is exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from frozenprefix.errors import ExportError
from frozenprefix.models.mappers import PrefixMapper
from frozenprefix.models.mappers.components import PrincipalComponents
from frozenprefix.models.mappers.linear import LinearMapper
from frozenprefix.models.mappers.mlp import MLPMapper
from frozenprefix.models.mappers.pixel_shuffle import PixelShuffleMapper

_EMBEDS = "`frozenprefix export embeds` gives its prefixes to any engine, and `caption --engine llama.cpp` runs it"
_FORM = "engines have linear, GELU, linear, applied to every image token"


@dataclass(frozen=True)
class PlainNorm:
    """A layer norm: weight and bias, float32[D], and eps."""

    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> PlainNorm:
        return cls(norm.weight.detach().float().cpu(), norm.bias.detach().float().cpu(), norm.eps)


@dataclass(frozen=True)
class PlainMLP:
    """`up`, GELU, `down`, for each image token.

    Attributes:
        up: float32[hidden, D_enc]; down: float32[D_lm, hidden]; biases float32[hidden] and float32[D_lm].
        gelu: "erf" (the definition), "tanh" (the approximation), or "any" where both give the same result.
        norms: layer norms in front of GELU and behind `down`; None for neither.
    """

    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor
    gelu: Literal["erf", "tanh", "any"]
    norms: tuple[PlainNorm, PlainNorm] | None = None

    @property
    def hidden(self) -> int:
        return self.up.shape[0]

    def widened(self, hidden: int) -> PlainMLP:
        """The same function with more hidden units, which are zero; GELU(0) = 0."""
        pad = hidden - self.hidden
        zeros = nn.functional.pad
        return PlainMLP(
            zeros(self.up, (0, 0, 0, pad)),
            zeros(self.up_bias, (0, pad)),
            zeros(self.down, (0, pad)),
            self.down_bias,
            self.gelu,
        )


def plain_mlp(mapper: PrefixMapper, num_tokens: int, prefix_length: int) -> PlainMLP:
    """The mapper as a `PlainMLP`.

    A linear mapper becomes one, too: x = GELU(x) - GELU(-x) for both forms of GELU.

    Raises:
        ExportError: naming the option that has no place in an MLP, and what could be exported.

    Example:
        >>> from frozenprefix.models.configuration import MapperConfig
        >>> from frozenprefix.models.mappers import build_mapper
        >>> config = MapperConfig(type="linear", prefix_length=9, output_norm="none")
        >>> mapper = build_mapper(config, encoder_dim=16, num_tokens=9, lm_dim=8, embedding_rms=0.1)
        >>> plain_mlp(mapper, num_tokens=9, prefix_length=9).hidden
        16
    """
    body: Any = mapper.body
    problem = _problem(mapper, body, num_tokens, prefix_length)
    if problem:
        raise ExportError(f"{problem}; {_EMBEDS}")
    if isinstance(body, LinearMapper) or len(body.layers) == 1:
        last = body.project if isinstance(body, LinearMapper) else body.layers[0]
        return _as_mlp(last)
    first, last = body.layers[0], body.layers[-1]
    activation = next(layer for layer in body.layers if isinstance(layer, nn.GELU))
    gelu: Literal["erf", "tanh"] = "tanh" if activation.approximate == "tanh" else "erf"
    up, up_bias, down, down_bias = (p.detach().float().cpu() for p in (*_parts(first), *_parts(last)))
    norms = None
    if not isinstance(mapper.scale, nn.Identity):
        norms = (PlainNorm.of(body.layers[1]), PlainNorm.of(mapper.scale.norm))
    return PlainMLP(up, up_bias, down, down_bias, gelu, norms)


def _problem(mapper: PrefixMapper, body: Any, num_tokens: int, prefix_length: int) -> str | None:
    """Why this is no such MLP, and which recipe would train one; None when it is one."""
    name = type(body).__name__
    if not isinstance(body, LinearMapper | MLPMapper | PixelShuffleMapper):
        return (
            f"model.mapper.type: a {name} has no form in other engines ({_FORM}); train 'mlp', 'linear' or "
            "'pixel_shuffle' on patch features"
        )
    has_norm = isinstance(body, MLPMapper) and any(isinstance(layer, nn.LayerNorm) for layer in body.layers)
    if has_norm and isinstance(mapper.scale, nn.Identity):
        return (
            "model.mapper.hidden_norm: got true without output_norm; llama.cpp has both norms or none: train with both"
        )
    if not has_norm and not isinstance(mapper.scale, nn.Identity):
        return (
            "model.mapper.output_norm: got 'layer', a layer norm behind the mapper, which other engines do not have "
            "there, and which no linear layer can contain; train with model.mapper.output_norm=none, or "
            "for llama.cpp with model.mapper.hidden_norm=true"
        )
    if isinstance(body.input_norm, PrincipalComponents):
        return "model.mapper.components: got principal components, which other engines do not have; train without them"
    if not isinstance(body.input_norm, nn.Identity):
        return "model.mapper.input_norm: got true, a layer norm that other engines do not have; train without it"
    if isinstance(body, PixelShuffleMapper) and body.shuffle > 1:
        return (
            f"model.mapper.shuffle: got {body.shuffle}, but {_FORM}; train with shuffle=1 and fewer image tokens, from "
            "a smaller model.vision_encoder.image_size"
        )
    if prefix_length != num_tokens or getattr(body, "together", False):
        return (
            f"model.mapper: makes {prefix_length} embeddings of {num_tokens} image tokens together, but {_FORM}; train "
            f"with model.vision_encoder.output=patch, mapper.tokens=per_token and mapper.prefix_length equal to the "
            "number of image tokens"
        )
    if isinstance(body, LinearMapper):
        return None
    linears = [layer for layer in body.layers if isinstance(layer, nn.Linear)]
    others = [layer for layer in body.layers if not isinstance(layer, nn.Linear | nn.LayerNorm | nn.Dropout)]
    if len(linears) > 2:
        return f"model.mapper.num_layers: got {len(linears)}, but {_FORM}; train with num_layers=2"
    if any(not isinstance(layer, nn.GELU) for layer in others):
        return f"model.mapper.activation: got {type(others[0]).__name__}, but {_FORM}; train with activation=gelu_tanh"
    return None


def _parts(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return layer.weight, layer.bias


def _as_mlp(layer: nn.Linear) -> PlainMLP:
    """W x + b = [W -W] GELU([x; -x]) + b, or [1 -1] GELU([W; -W] x) + b, whichever has fewer hidden units."""
    weight, bias = (p.detach().float().cpu() for p in _parts(layer))
    width_out, width_in = weight.shape
    eye = torch.eye(min(width_in, width_out))
    both = torch.cat([eye, -eye])
    zero = torch.zeros(len(both))
    if width_in <= width_out:
        return PlainMLP(both, zero, torch.cat([weight, -weight], dim=1), bias, "any")
    return PlainMLP(torch.cat([weight, -weight]), zero, both.T.contiguous(), bias, "any")
