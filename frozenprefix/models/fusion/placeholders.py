"""Prefix embeddings in the places of `<image>` placeholders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from frozenprefix.errors import ConfigError, DataError
from frozenprefix.models.language_model.base import FrozenLM, Rows, word_embeddings


def index_placeholders(input_ids: Tensor, image_token_id: int, num_prefix_embeds: int) -> Tensor:
    """Number the placeholders of a batch in reading order.

    Args:
        input_ids: int64[B, T].
        num_prefix_embeds: number of prefix embeddings, images * prefix_length.

    Returns:
        int64[B, T]: index of each placeholder into the flattened prefix embeddings, -1 for text.

    Raises:
        DataError: if there are more or fewer placeholders than prefix embeddings.

    Example:
        >>> index_placeholders(torch.tensor([[300, 300, 5], [6, 300, 300]]), 300, num_prefix_embeds=4).tolist()
        [[0, 1, -1], [-1, 2, 3]]
    """
    is_image = input_ids == image_token_id
    held = int(is_image.sum())
    if held != num_prefix_embeds:
        raise DataError(
            f"input_ids hold {held} image placeholders, the images give {num_prefix_embeds}; "
            "every <image> in the text needs one image, and prefix_length placeholders"
        )
    return torch.where(is_image.flatten(), is_image.flatten().cumsum(0) - 1, -1).view_as(input_ids)


def fuse_prefix(
    embeddings: Callable[[Tensor], Tensor], input_ids: Tensor, prefix_index: Tensor, prefix_embeds: Tensor | None
) -> Tensor:
    """Word embeddings, with prefix embeddings in the places of the placeholders.

    Args:
        embeddings: the LM's input embedding layer, int64[B, T] -> float[B, T, D_lm].
        input_ids: int64[B, T]; the id of a placeholder may lie outside of the vocabulary.
        prefix_index: int64[B, T] from `index_placeholders`, -1 for text.
        prefix_embeds: float[images, P, D_lm], or None for text only.

    Returns:
        float[B, T, D_lm] in the dtype of the LM.

    Example:
        >>> embeddings, ids = torch.nn.Embedding(10, 4), torch.tensor([[300, 5]])
        >>> fused = fuse_prefix(embeddings, ids, index_placeholders(ids, 300, 1), torch.ones(1, 1, 4))
        >>> fused[0, 0].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    is_image = prefix_index >= 0
    # [B, T] -> [B, T, D_lm]
    inputs_embeds = embeddings(input_ids.masked_fill(is_image, 0))
    if prefix_embeds is None:
        return inputs_embeds
    # [images, P, D_lm] -> [images * P, D_lm]
    flat = prefix_embeds.flatten(0, 1).to(inputs_embeds.dtype)
    return inputs_embeds.index_put((is_image,), flat[prefix_index[is_image]])


def fuse(
    language_model: FrozenLM[Any] | PreTrainedModel,
    text: Rows | Tensor,
    prefix_embeds: Tensor | None,
    *,
    image_token_id: int | None = None,
) -> Tensor:
    """Input embeddings of a text with images in it, for any language model of transformers, wrapped or not.

    Args:
        text: packed rows, from `FrozenLM.layout`, or token ids int64[B, T] with the placeholders of the images.
        prefix_embeds: float[images, P, D_lm], from a mapper; None for text only.
        image_token_id: of the placeholders in token ids, for instance the first id after the vocabulary.

    Returns:
        inputs_embeds: float[B, T, D_lm] in the dtype of the language model.

    Raises:
        DataError: for more or fewer placeholders than prefix embeddings.
        ConfigError: for token ids without `image_token_id`.

    Example:
        >>> ids = torch.tensor([[300, 300, 5, 6]])
        >>> fuse(model.language_model, ids, torch.zeros(1, 2, 32), image_token_id=300).shape
        torch.Size([1, 4, 32])
    """
    embeddings = language_model.embed if isinstance(language_model, FrozenLM) else word_embeddings(language_model)
    count = 0 if prefix_embeds is None else len(prefix_embeds) * prefix_embeds.shape[1]
    if not isinstance(text, Tensor):
        held = int(text.prefix_index.max()) + 1
        if held != count:
            raise DataError(f"the rows hold {held} image placeholders, the images give {count} prefix embeddings")
        return fuse_prefix(embeddings, text.input_ids, text.prefix_index, prefix_embeds)
    if image_token_id is None:
        raise ConfigError("fuse: image_token_id: missing; token ids do not say which of them stand for an image")
    return fuse_prefix(embeddings, text, index_placeholders(text, image_token_id, count), prefix_embeds)
