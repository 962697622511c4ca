"""Prepacks the frozen weights of a language model for as long as it is trained through on a CPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.pytorch_utils import Conv1D

from frozenprefix.kernels.linear import Layer, PrepackedForward, prepackable_dtypes
from frozenprefix.kernels.llama_layer import FrozenLayer, frozen_layers

logger = logging.getLogger(__name__)
MAX_BYTES = 2 * 2**30  # of all prepacked copies together


@contextmanager
def prepacked_frozen_weights(language_model: nn.Module) -> Iterator[None]:
    """Use prepacked copies of the weights of frozen linear layers inside the block, on a CPU, in bfloat16 and float32.

    A decoder layer that is frozen as a whole becomes one function if it is of a family that `llama_layer` supports. The
    head is prepacked tile by tile, for the loss. No weight is copied twice, and the weights must not change inside the
    block. Layers that are trained, quantized, on another device or of another dtype stay as they are, and so do all
    layers if the copies would take more than `MAX_BYTES`. Inside the block the model cannot be copied or pickled.

    Example:
        >>> with prepacked_frozen_weights(model.language_model):
        ...     loss = model(**processor(image, "<image>a dog", return_tensors="pt")).logits.sum()
    """
    head = _head(language_model)
    try:
        for layer in prepackable_layers(language_model):
            layer.forward = PrepackedForward(layer)  # type: ignore[method-assign]
            layer.forward.copied_elsewhere = layer is head  # in tiles
        for frozen in frozen_layers(language_model):
            frozen.layer.forward = frozen
        yield
    finally:
        for module in language_model.modules():
            if isinstance(vars(module).get("forward"), PrepackedForward | FrozenLayer):
                del module.forward


def prepackable_layers(language_model: nn.Module) -> list[Layer]:
    """Return the linear layers that `prepacked_frozen_weights` changes.

    Example:
        >>> layers = prepackable_layers(model.language_model)
        >>> prepacked_bytes(layers) == 2 * sum(layer.weight.nbytes for layer in layers)
        True
    """
    layers = [module for module in language_model.modules() if isinstance(module, Layer) and _is_prepackable(module)]
    if prepacked_bytes(layers) > MAX_BYTES:
        # The head goes first: its copy is the largest, and the loss reads it tile by tile anyway.
        head = _head(language_model)
        layers = [layer for layer in layers if layer is not head]
    size = prepacked_bytes(layers)
    if size > MAX_BYTES:
        logger.info("frozen weights are not prepacked: the copies would take %.1f GiB", size / 2**30)
        return []
    return layers


def prepacked_bytes(layers: list[Layer]) -> int:
    """Bytes that the copies of `layers` take: one for the forward pass, one for the backward pass.

    Example:
        >>> prepacked_bytes([nn.Linear(4, 2)])  # 2 copies of 8 weights of 4 bytes
        64
    """
    return sum(2 * layer.weight.nbytes for layer in layers)


def _head(language_model: nn.Module) -> nn.Module | None:
    return getattr(language_model, "get_output_embeddings", lambda: None)()


def _is_prepackable(layer: Layer) -> bool:
    if type(layer) not in (nn.Linear, Conv1D):  # a subclass may do more than a product
        return False
    dtypes = prepackable_dtypes()
    return all(not p.requires_grad and p.dtype in dtypes and p.device.type == "cpu" for p in layer.parameters())
