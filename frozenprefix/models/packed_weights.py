"""Frozen weights in the layout that oneDNN's matrix products want, for training on a CPU.

oneDNN brings a weight into its own layout before every product. A frozen weight needs that once: one copy for the
forward pass and one for the gradient of the input, beside the weight itself, which stays as it is. In float32 PyTorch
takes MKL for its own products, which on an AMD processor is the slower of the two: `benchmarks/products.py`.
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
    def forward(ctx: Any, x: Tensor, layer: PackedForward) -> Tensor:
        ctx.layer = layer
        return product(x, layer.weight, layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return product(grad_outputs[0], ctx.layer.transposed), None


def product(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, with a packed weight: [rows, in] -> [rows, out]."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")


class PackedForward:
    """Stands in for the forward pass of one layer; copies of its weight are made when they are first needed.

    `weight` and `transposed` are for `product`, the only thing that can read them.
    """

    def __init__(self, layer: Layer):
        weight = layer.weight.detach()
        self.own, self.dtype, self.bias = layer.forward, weight.dtype, layer.bias
        self._plain = weight if isinstance(layer, nn.Linear) else weight.t()  # [out, in]

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != self.dtype or torch.is_autocast_enabled("cpu"):  # the layer knows what to do
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
    """Use packed copies of the weights of frozen linear layers inside the block, on a CPU, in bfloat16 and float32.

    These weights must not change inside. Layers that are trained, quantized or of another dtype stay as they are, and
    so does everything where the copies would take more than `LARGEST` bytes, on other devices, and bfloat16 where the
    processor has no products in it. Inside the block the model can be neither copied nor pickled.
    """
    layers = packable_layers(language_model)
    for layer in layers:
        layer.forward = PackedForward(layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def packable_layers(language_model: nn.Module) -> list[Layer]:
    """The layers that `packed_frozen_weights` changes."""
    layers = [module for module in language_model.modules() if isinstance(module, Layer) and _is_packable(module)]
    if packed_bytes(layers) > LARGEST:  # rather all layers than the head, which is read once
        head = getattr(language_model, "get_output_embeddings", lambda: None)()
        layers = [layer for layer in layers if layer is not head]
    size = packed_bytes(layers)
    if size > LARGEST:
        logger.info("frozen weights are not packed: the copies would take %.1f GiB", size / 2**30)
        return []
    return layers


def packed_bytes(layers: list[Layer]) -> int:
    return sum(2 * layer.weight.nbytes for layer in layers)


def _is_packable(layer: Layer) -> bool:
    """Subclasses may do more than a product."""
    dtypes = packable_dtypes()
    frozen = all(not p.requires_grad and p.dtype in dtypes and p.device.type == "cpu" for p in layer.parameters())
    return frozen and type(layer) in (nn.Linear, Conv1D)


def packable_dtypes() -> tuple[torch.dtype, ...]:
    """What this machine's oneDNN has products in."""
    if not torch.backends.mkldnn.is_available():
        return ()
    half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if half else (torch.float32,)
