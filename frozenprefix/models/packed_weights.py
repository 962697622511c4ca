"""Frozen weights in the layout that oneDNN's matrix products want, for training in bfloat16 on a CPU.

oneDNN brings a weight into its own layout before every product. A frozen weight needs that once: one copy for the
forward pass and one for the gradient of the input, beside the weight itself, which stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)
LARGEST = 2 * 2**30  # bytes that the copies may take
ROWS = 512  # the layout may depend on it: always the same, or a resumed run would not get equal bits
Layer = nn.Linear | Conv1D


class _PackedProduct(torch.autograd.Function):
    """x @ weight.T + bias on x: [rows, in]; no gradient but that of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _PackedForward) -> Tensor:
        ctx.layer = layer
        return _product(x, layer.weight, layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return _product(grad_outputs[0], ctx.layer.transposed, None), None


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")


class _PackedForward:
    """Stands in for the forward pass of one layer; copies of its weight are made when they are first needed."""

    def __init__(self, layer: Layer):
        weight = layer.weight.detach()
        self.own, self.dtype, self.bias = layer.forward, weight.dtype, layer.bias
        self._plain = weight if isinstance(layer, nn.Linear) else weight.t()  # [out, in]

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != self.dtype:  # autocast, say: the layer knows what to do
            return self.own(x)
        # reshaped outside of the function: what it returns may be changed in place
        rows = _PackedProduct.apply(x.reshape(-1, x.shape[-1]), self)
        return rows.view(*x.shape[:-1], rows.shape[-1])

    @cached_property
    def weight(self) -> Tensor:
        return _packed(self._plain)

    @cached_property
    def transposed(self) -> Tensor:
        return _packed(self._plain.t())


def _packed(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)


@contextmanager
def packed_frozen_weights(language_model: nn.Module) -> Iterator[None]:
    """Use packed copies of the weights of frozen linear layers inside the block, on a CPU and in bfloat16.

    These weights must not change inside. Layers that are trained, quantized or of another dtype stay as they are, and
    so does everything where the copies would take more than `LARGEST` bytes, on other devices, and where the processor
    has no products in bfloat16. Inside the block the model can be neither copied nor pickled.
    """
    layers = packable_layers(language_model)
    for layer in layers:
        layer.forward = _PackedForward(layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def packable_layers(language_model: nn.Module) -> list[Layer]:
    """The layers that `packed_frozen_weights` changes."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return []
    head = getattr(language_model, "get_output_embeddings", lambda: None)()  # it goes its own way, see losses.py
    layers = [
        module
        for module in language_model.modules()
        if isinstance(module, Layer) and module is not head and _is_packable(module)
    ]
    size = packed_bytes(layers)
    if size > LARGEST:
        logger.info("frozen weights are not packed: the copies would take %.1f GiB", size / 2**30)
        return []
    return layers


def packed_bytes(layers: list[Layer]) -> int:
    return sum(2 * layer.weight.nbytes for layer in layers)


def _is_packable(layer: Layer) -> bool:
    """Subclasses may do more than a product."""
    weights = list(layer.parameters())
    frozen = all(not p.requires_grad and p.dtype == torch.bfloat16 and p.device.type == "cpu" for p in weights)
    return frozen and type(layer) in (nn.Linear, Conv1D)
