"""Frozen weights in the layout that oneDNN's matrix products want, for training in bfloat16 on a CPU.

oneDNN brings a weight into its own layout before every product. A frozen weight needs that once: one copy for the
forward pass and one for the gradient of the input, beside the weight itself, which stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
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
    """x @ weight.T + bias; no gradient but that of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, transposed: Tensor, bias: Tensor | None) -> Tensor:
        ctx.transposed = transposed
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return _product(grad_outputs[0], ctx.transposed, None), None, None, None


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")


class _PackedForward:
    """Stands in for the forward pass of one layer, whose weight it packs at the first call."""

    def __init__(self, layer: Layer):
        self.layer, self.own = layer, layer.forward
        self.packed: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.layer.weight.detach()
        if x.dtype != weight.dtype:  # autocast, say: the layer knows what to do
            return self.own(x)
        if self.packed is None:
            pair = (weight, weight.t()) if isinstance(self.layer, nn.Linear) else (weight.t(), weight)
            forward, backward = (torch.ops.mkldnn._reorder_linear_weight(each.contiguous(), ROWS) for each in pair)
            self.packed = forward, backward
        # reshaped outside of the function: what it returns may be changed in place
        rows = _PackedProduct.apply(x.reshape(-1, x.shape[-1]), *self.packed, self.layer.bias)
        return rows.view(*x.shape[:-1], rows.shape[-1])


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
