"""Attention for packed rows on the CPU.

Packed rows are short (tens to hundreds of tokens), and each has a mask of its own. torch's CPU kernel for
`scaled_dot_product_attention` is slow on such rows, most of all in the backward pass. For 12 rows of 80 tokens the
plain matrix products here take a quarter of its time in bfloat16, and the same time in float32
(`benchmarks/attention.py`). On other devices SDPA is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from frozenprefix.kernels import compat

MATMUL = "frozenprefix_matmul"
RECORDED = "frozenprefix_recorded"


def matmul_attention(
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
    """Attention as plain matrix products. Keys and values that several query heads share are not copied.

    Args:
        module: unused, as are `dropout` and further keywords; transformers passes them to every attention function.
        query: float[R, H, T, D]; key, value: float[R, G, S, D], where G divides H.
        attention_mask: additive float[R, 1, T, S].
        scaling: factor of the scores; 1 / sqrt(D) if not given. softcap: Gemma 2's cap on the scores.

    Returns:
        float[R, T, H, D], and None in place of the attention weights.

    Example:
        >>> query, key, mask = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 8), torch.zeros(1, 1, 3, 3)
        >>> matmul_attention(torch.nn.Identity(), query, key, key, mask)[0].shape
        torch.Size([1, 3, 4, 8])
    """
    return _attend(query, key, value, attention_mask, scaling, softcap)[0], None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The result float[R, T, H, D] of attention, and its weights float[R, G, H/G, T, S]."""
    rows, heads, length, dim = query.shape
    groups, keys = key.shape[1:3]
    per_group = heads // groups
    # The query heads of a group become more rows of one product: [R, H, T, D] -> [R, G, H/G * T, D]
    query = (query * (dim**-0.5 if scaling is None else scaling)).reshape(rows, groups, per_group * length, dim)
    # -> [R, G, H/G, T, S]
    scores = (query @ key.transpose(-1, -2)).view(rows, groups, per_group, length, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = (scores + attention_mask.unsqueeze(2)).softmax(dim=-1)
    # [R, G, H/G * T, S] @ [R, G, S, D]
    mixed = weights.view(rows, groups, per_group * length, keys) @ value
    # -> [R, T, H, D]
    return mixed.view(rows, heads, length, dim).transpose(1, 2), weights


AttentionInterface.register(MATMUL, matmul_attention)


@contextmanager
def recording_attention(language_model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the attention weights of packed rows inside the block, layer by layer, with their graph.

    Yields:
        A list that the block fills with float[R, G, H / G, T, S], G groups of heads that share keys. It stays empty for
        a language model whose attention cannot be exchanged.

    Example:
        >>> from frozenprefix.models.packing import Target, pack
        >>> rows = pack([[Target([5, 6, 7], 1)]], image_token_id=300, prefix_length=0, images_per_group=[0])
        >>> with recording_attention(model.language_model) as weights:
        ...     _ = model.packed_hidden(rows, None)
        >>> len(weights), weights[0].shape  # two tokens are read, the third is predicted
        (2, torch.Size([1, 2, 2, 2, 2]))
    """
    recorded: list[Tensor] = []

    def attention(
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
        mixed, weights = _attend(query, key, value, attention_mask, scaling, softcap)
        recorded.append(weights)
        return mixed, None

    AttentionInterface.register(RECORDED, attention)
    try:
        with _attention_of(language_model, RECORDED, "there are no maps of attention"):
            yield recorded
    finally:
        AttentionInterface.register(RECORDED, matmul_attention)  # lets go of what was recorded


@contextmanager
def attention_for_rows(language_model: PreTrainedModel) -> Iterator[None]:
    """Use `matmul_attention` in place of SDPA inside the block, on the CPU, where it is the faster one.

    Example:
        >>> with attention_for_rows(model.language_model):
        ...     compat.attention_implementation(model.language_model.config)
        'frozenprefix_matmul'
    """
    before = compat.attention_implementation(language_model.config.get_text_config())
    if before != "sdpa" or language_model.device.type != "cpu":
        yield
        return
    with _attention_of(language_model, MATMUL, "torch's attention is used for packed rows"):
        yield


@contextmanager
def _attention_of(language_model: PreTrainedModel, name: str, consequence: str) -> Iterator[None]:
    """Use the attention of this name inside the block, where this release of transformers lets it be exchanged."""
    config = language_model.config.get_text_config()
    before = compat.attention_implementation(config)
    # The public `set_attn_implementation` visits every module, and warns for models that have one attention only.
    switch = "_attn_implementation_internal"
    if compat.private(config, switch, consequence) is None:
        yield
        return
    setattr(config, switch, name)
    try:
        yield
    finally:
        setattr(config, switch, before)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """bool[R, T, S] -> float[R, 1, T, S]: 0 where query t sees key s, the lowest number of `dtype` elsewhere.

    Example:
        >>> additive_mask(torch.tensor([[[True, False]]]), torch.float32).tolist()
        [[[[0.0, -3.4028234663852886e+38]]]]
    """
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)


def mask_per_kind(config: PreTrainedConfig, mask: Tensor) -> Tensor | dict[str, Tensor]:
    """Return the mask as a decoder expects it: one per kind of layer if it has several kinds (Gemma 3).

    Example:
        >>> config = model.language_model.config
        >>> mask_per_kind(config, torch.zeros(1, 1, 2, 2)).shape
        torch.Size([1, 1, 2, 2])
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    return dict.fromkeys(kinds, mask) if len(kinds) > 1 else mask
