"""New tokens through a frozen decoder of the Llama family, with keys and values in a cache, on a CPU.

A search reads one word of each text at a time. Between the products, which take as long as their weights are read, the
decoder's own code makes hundreds of small calls in every layer. Here are the same products with a quarter of the calls.

Shape letters: R rows, T new tokens in a row, N = R * T, S tokens in the cache, D width, H query heads and G key heads
of width d.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from frozenprefix.kernels.compat import has_hooks
from frozenprefix.kernels.llama_layer import FrozenLayer, rotate, signed_sine

DECODERS = (LlamaModel, MistralModel, Qwen2Model)


def layers_to_read(decoder: Any) -> list[FrozenLayer]:
    """Layers for `read_tokens`: all of the decoder's, if each is one function and nothing looks into it; else none.

    Example:
        >>> layers_to_read(model.language_model.base_model)  # outside of prepacked_to_generate
        []
    """
    if type(decoder) not in DECODERS or "forward" in vars(decoder) or torch.is_autocast_enabled("cpu"):
        return []
    layers = [vars(layer).get("forward") for layer in decoder.layers]
    whole = all(isinstance(layer, FrozenLayer) for layer in layers) and not any(map(has_hooks, decoder.modules()))
    return layers if whole else []


@torch.no_grad()
def read_tokens(
    decoder: Any,
    layers: Sequence[FrozenLayer],
    inputs_embeds: Tensor,
    mask: Tensor | Mapping[str, Tensor],
    positions: Tensor,
    cache: Cache,
) -> Tensor:
    """Last hidden states of tokens after those in the cache, without a gradient: float[R, T, D] -> float[R, T, D].

    Args:
        decoder, layers: a decoder and its layers, by `layers_to_read`.
        mask: additive float[R, 1, T, S], or the same one for each kind of layer.
        positions: int64[R, T].
        cache: takes the keys and values of the new tokens.

    Example:
        >>> from frozenprefix.kernels import prepacked_to_generate
        >>> decoder = model.language_model.base_model
        >>> with prepacked_to_generate(model.language_model):
        ...     len(layers_to_read(decoder)) == len(decoder.layers)
        True
    """
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()))
    cos, sin = decoder.rotary_emb(inputs_embeds, position_ids=positions)
    rotation = (cos, signed_sine(sin))
    hidden = inputs_embeds
    for layer in layers:
        hidden = _read(layer, hidden, mask, rotation, cache)
    return _rms_norm(hidden, decoder.norm)


def _read(frozen: FrozenLayer, hidden: Tensor, mask: Tensor, rotation: tuple[Tensor, Tensor], cache: Cache) -> Tensor:
    layer, (rows, length, width) = frozen.layer, hidden.shape
    x = hidden.reshape(-1, width)
    heads = frozen.query_key_value.forward(_rms_norm(x, layer.input_layernorm)).view(rows, length, -1, frozen.dim)
    rotate(heads[:, :, : frozen.queries + frozen.keys], *rotation)
    queries, keys, values = heads.transpose(1, 2).split((frozen.queries, frozen.keys, frozen.keys), dim=1)
    keys, values = cache.update(keys, values, layer.self_attn.layer_idx)
    # query heads that share a key head are rows of one product: [R, G, H/G T, d] @ [R, G, d, S]
    per_key = frozen.queries // frozen.keys
    mixed = F.scaled_dot_product_attention(
        queries.reshape(rows, frozen.keys, per_key * length, frozen.dim),
        keys,
        values,
        attn_mask=mask if length == 1 else mask.repeat(1, 1, per_key, 1),
        scale=frozen.scaling,
    )
    # -> [N, H d] -> [N, D]
    mixed = mixed.reshape(rows, frozen.queries, length, frozen.dim).transpose(1, 2).reshape(len(x), -1)
    middle = frozen.out.forward(mixed).add_(x)
    gate, up = frozen.gate_up.forward(_rms_norm(middle, layer.post_attention_layernorm)).chunk(2, dim=-1)
    return frozen.down.forward(F.silu(gate).mul_(up)).add_(middle).view(hidden.shape)


def _rms_norm(x: Tensor, norm: Any) -> Tensor:
    """[..., D] -> [..., D]."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
