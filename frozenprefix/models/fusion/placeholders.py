"""How the image enters the language model: prefix embeddings in place of `<image>` placeholders."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from frozenprefix.errors import DataError


def index_placeholders(input_ids: Tensor, image_token_id: int, num_prefix_embeds: int) -> Tensor:
    """Number the placeholders of a batch in reading order.

    Args:
        input_ids: int64[B, T].
        num_prefix_embeds: prefix embeddings at hand, images * prefix_length.

    Returns:
        int64[B, T]: index of each placeholder into the flattened prefix embeddings, -1 for text.

    Raises:
        DataError: when images and placeholders do not match in number.
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
    """Word embeddings, with prefix embeddings where the placeholders stand.

    Args:
        embeddings: the LM's input embedding layer.
        input_ids: int64[B, T]; ids under placeholders may lie outside the vocabulary.
        prefix_index: int64[B, T], -1 for text.
        prefix_embeds: float[images, P, D_lm], or None for text alone.

    Returns:
        float[B, T, D_lm] in the dtype of the LM.
    """
    is_image = prefix_index >= 0
    # [B, T] -> [B, T, D_lm]
    inputs_embeds = embeddings(input_ids.masked_fill(is_image, 0))
    if prefix_embeds is None:
        return inputs_embeds
    flat = prefix_embeds.flatten(0, 1).to(inputs_embeds.dtype)
    return inputs_embeds.index_put((is_image,), flat[prefix_index[is_image]])
