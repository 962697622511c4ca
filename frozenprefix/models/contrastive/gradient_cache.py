"""Gradient caching (Gao et al. 2021, arXiv 2101.06983): the exact gradient of batches larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from frozenprefix.utils.random_state import random_state, set_random_state

Chunk = TypeVar("Chunk")


def cached_contrastive_step(
    encode_images: Callable[[Chunk], Tensor],
    image_chunks: Sequence[Chunk],
    encode_texts: Callable[[Chunk], Tensor],
    text_chunks: Sequence[Chunk],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Accumulate the gradient of a contrastive loss over the whole batch, holding activations of one chunk at a time.

    All chunks are encoded without a graph, and the loss gives the gradient of every embedding. Then each chunk is
    encoded again, with the same random numbers, to back-propagate its part. This costs one more forward pass.

    Args:
        encode_images, encode_texts: one chunk -> float[n, D].
        image_chunks, text_chunks: the batch.
        loss: (float[P, D], float[T, D]) -> scalar. Parameters within it get their gradient too.

    Returns:
        The loss, detached.

    Example:
        >>> from torch import nn
        >>> images, texts = nn.Linear(3, 2), nn.Linear(4, 2)
        >>> chunks = torch.randn(2, 5, 3), torch.randn(2, 5, 4)  # 2 chunks of 5
        >>> loss = cached_contrastive_step(images, chunks[0], texts, chunks[1], lambda i, t: (i @ t.T).mean())
        >>> images.weight.grad.shape
        torch.Size([2, 3])
    """
    parts = [(encode_images, chunk) for chunk in image_chunks] + [(encode_texts, chunk) for chunk in text_chunks]
    states, embeds = [], []
    for encode, chunk in parts:
        states.append(random_state())
        with torch.no_grad():
            embeds.append(encode(chunk))
    images = torch.cat(embeds[: len(image_chunks)]).requires_grad_()
    texts = torch.cat(embeds[len(image_chunks) :]).requires_grad_()
    value = loss(images, texts)
    value.backward()
    gradients = torch.cat([_gradient(images), _gradient(texts)]).split([len(part) for part in embeds])
    after = random_state()
    for (encode, chunk), state, gradient in zip(parts, states, gradients, strict=True):
        set_random_state(state)
        again = encode(chunk)
        if again.requires_grad:
            again.backward(gradient.to(again.dtype))
    set_random_state(after)
    return value.detach()


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
