"""Prepacks the frozen weights of a language model on a CPU: while it is trained through, and for what it generates."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from frozenprefix.kernels.linear import Layer, PrepackedForward, prepackable_dtypes
from frozenprefix.kernels.llama_layer import FrozenLayer, frozen_layers

logger = logging.getLogger(__name__)
MAX_BYTES = 2 * 2**30  # of all prepacked copies together
MARKED = 16  # values of a weight that are compared


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
        _take_out(language_model)


@contextmanager
def prepacked_to_generate(language_model: nn.Module) -> Iterator[None]:
    """Use prepacked copies inside the block, for passes without a gradient, and keep them for the next such block.

    One copy of each weight is kept as long as the language model lives; it is made anew if weights or modules have
    changed. Inside `prepacked_frozen_weights` those copies serve. All else is as there.

    Example:
        >>> with prepacked_to_generate(model.language_model):
        ...     ids = model.generate(**processor(image, "", return_tensors="pt"), max_new_tokens=2)
    """
    if any("forward" in vars(module) for module in language_model.modules()):
        yield
        return
    layers = prepackable_layers(language_model)
    mark = _mark_of(language_model, layers)
    kept = _KEPT.get(language_model)
    try:
        if kept is None or kept.mark != mark:
            forwards: dict[nn.Module, Any] = {layer: PrepackedForward(layer) for layer in layers}
            _put_in(forwards)
            forwards |= {frozen.layer: frozen for frozen in frozen_layers(language_model)}
            kept = _KEPT[language_model] = _Kept(mark, forwards)
        _put_in(kept.forwards)
        yield
    finally:
        _take_out(language_model)


@dataclass
class _Kept:
    """Copies by the modules that use them, and a mark of the model that they were made of."""

    mark: list[Any]
    forwards: dict[nn.Module, Any]


_KEPT: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def _put_in(forwards: dict[nn.Module, Any]) -> None:
    for module, forward in forwards.items():
        module.forward = forward


def _take_out(language_model: nn.Module) -> None:
    for module in language_model.modules():
        if isinstance(vars(module).get("forward"), PrepackedForward | FrozenLayer):
            vars(module).pop("forward", None)  # another thread may have done so


def _mark_of(language_model: nn.Module, layers: list[Layer]) -> list[Any]:
    """What differs once modules or weights have changed: the modules, where the weights are, and some of their values.

    A module that is put in later, as an adapter of peft, would be passed by otherwise. The version of a weight would
    not do: `weight.data += update`, as peft merges an adapter, does not change it.
    """
    modules = list(language_model.modules())[1:]  # without the model itself, which the copies must not keep alive
    values = (_mark(value) for layer in layers for value in (layer.weight, layer.bias) if value is not None)
    return [*modules, *values]


def _mark(weight: Tensor) -> tuple[Any, ...]:
    values = weight.detach().flatten()
    return (weight.data_ptr(), weight.shape, *values[:: max(1, len(values) // MARKED)].tolist())


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
