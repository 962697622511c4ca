"""Attention for packed rows on the CPU.

Rows are short (tens to hundreds of tokens) and masked in their own way. torch's CPU kernel for
`scaled_dot_product_attention` walks such rows slowly, backwards most of all: at 12 rows of 80 tokens in bfloat16 the
plain matrix products here take a quarter of its time, in float32 as long (`benchmarks/attention.py`). On other devices
SDPA is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

NAME = "frozenprefix_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as plain matrix products, without copies of keys and values for query heads that share them.

    Args:
        query: float[R, H, T, D]; key, value: float[R, G, S, D] with G a divisor of H.
        attention_mask: additive float[R, 1, T, S].
        scaling: 1 / sqrt(D) when not given; softcap: Gemma 2's cap on scores.

    Returns:
        float[R, T, H, D], and no weights, as transformers' attention functions do.
    """
    rows, heads, length, dim = query.shape
    groups, keys = key.shape[1:3]
    per_group = heads // groups
    # query heads of a group become more rows of one product: [R, G, H/G * T, D]
    query = (query * (dim**-0.5 if scaling is None else scaling)).reshape(rows, groups, per_group * length, dim)
    scores = (query @ key.transpose(-1, -2)).view(rows, groups, per_group, length, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = (scores + attention_mask.unsqueeze(2)).softmax(dim=-1)
    # [R, G, H/G * T, S] @ [R, G, S, D]
    mixed = weights.view(rows, groups, per_group * length, keys) @ value
    return mixed.view(rows, heads, length, dim).transpose(1, 2), None


AttentionInterface.register(NAME, packed_attention)


@contextmanager
def attention_for_rows(language_model: PreTrainedModel) -> Iterator[None]:
    """Use `packed_attention` inside the block where it is the faster one: on the CPU, in place of SDPA."""
    config = language_model.config.get_text_config()
    own = config._attn_implementation
    if own != "sdpa" or language_model.device.type != "cpu":
        yield
        return
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = own


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """bool[R, T, S] -> float[R, 1, T, S]: 0 where query t sees key s, else the lowest number."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)


def mask_per_kind(config: PreTrainedConfig, mask: Tensor) -> Tensor | dict[str, Tensor]:
    """The mask as the decoder wants it: models with several kinds of layers take one per kind."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return dict.fromkeys(kinds, mask) if len(kinds) > 1 else mask
