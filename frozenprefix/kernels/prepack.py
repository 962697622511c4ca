"""Frozen weights of a language model in the layout that a CPU's products want, while it is trained through."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.pytorch_utils import Conv1D

from frozenprefix.kernels.linear import Layer, PackedForward, packable_dtypes
from frozenprefix.kernels.llama_layer import PackedLayer, is_plain

logger = logging.getLogger(__name__)
LARGEST = 2 * 2**30  # bytes that the copies may take


@contextmanager
def packed_frozen_weights(language_model: nn.Module) -> Iterator[None]:
    """Use packed copies of the weights of frozen linear layers inside the block, on a CPU, in bfloat16 and float32.

    Decoder layers that are frozen as a whole become one function each, where `packed_layer` knows them; the head is for
    the loss, tile by tile. No weight is copied twice. These weights must not change inside. Layers that are trained,
    quantized or of another dtype stay as they are, and so does everything where the copies would take more than
    `LARGEST` bytes, on other devices, and bfloat16 where the processor has no products in it. Inside the block the
    model can be neither copied nor pickled.
    """
    layers = packable_layers(language_model)
    head = _head(language_model)
    try:
        for layer in layers:
            layer.forward = PackedForward(layer)  # type: ignore[method-assign]
            layer.forward.packed_elsewhere = layer is head  # in tiles, for the loss
        for module in language_model.modules():
            if is_plain(module):
                module.forward = PackedLayer(module)
        yield
    finally:
        for module in language_model.modules():
            if isinstance(vars(module).get("forward"), PackedForward | PackedLayer):
                del module.forward


def packable_layers(language_model: nn.Module) -> list[Layer]:
    """The linear layers that `packed_frozen_weights` changes."""
    layers = [module for module in language_model.modules() if isinstance(module, Layer) and _is_packable(module)]
    if packed_bytes(layers) > LARGEST:  # rather all layers than the head, which is read once
        head = _head(language_model)
        layers = [layer for layer in layers if layer is not head]
    size = packed_bytes(layers)
    if size > LARGEST:
        logger.info("frozen weights are not packed: the copies would take %.1f GiB", size / 2**30)
        return []
    return layers


def _head(language_model: nn.Module) -> nn.Module | None:
    return getattr(language_model, "get_output_embeddings", lambda: None)()


def packed_bytes(layers: list[Layer]) -> int:
    return sum(2 * layer.weight.nbytes for layer in layers)


def _is_packable(layer: Layer) -> bool:
    """Subclasses may do more than a product."""
    dtypes = packable_dtypes()
    frozen = all(not p.requires_grad and p.dtype in dtypes and p.device.type == "cpu" for p in layer.parameters())
    return frozen and type(layer) in (nn.Linear, Conv1D)
