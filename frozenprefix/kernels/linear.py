"""Products with frozen weights that lie in the layout that oneDNN's matrix products want.

oneDNN brings a weight into its own layout before every product. A frozen weight needs that once: one copy for the
forward pass and one for the gradient of the input, beside the weight itself, which stays as it is. In float32 PyTorch
takes MKL for its own products, which on an AMD processor is the slower of the two: `benchmarks/products.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

ROWS = 512  # the layout may depend on it: always the same, or a resumed run would not get equal bits
TILE = 8192  # words of a head at a time
Layer = nn.Linear | Conv1D


class FrozenWeight:
    """Weights as they are, [out, in], for products forth and back inside an autograd function."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.plain, self.bias = weight, bias

    def forth(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias: [rows, in] -> [rows, out]."""
        return F.linear(x, self.plain, self.bias)

    def back(self, grad: Tensor) -> Tensor:
        """The gradient of x: [rows, out] -> [rows, in]."""
        return grad @ self.plain


class PackedWeight:
    """The weights of one layer, or of several that read the same input, as one; copied when they are first needed.

    Of several layers either all have a bias or none has. With `words` only these outputs of each.
    """

    def __init__(self, *layers: Layer, words: slice = slice(None)):
        self._layers, self._words = layers, words
        biases = [layer.bias.detach()[words] for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None

    def forth(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias: [rows, in] -> [rows, out]."""
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self._weight, self.bias, "none", [], "")

    def back(self, grad: Tensor) -> Tensor:
        """The gradient of x: [rows, out] -> [rows, in]."""
        return torch.ops.mkldnn._linear_pointwise(grad.contiguous(), self._transposed, None, "none", [], "")

    @cached_property
    def _weight(self) -> Tensor:
        return _packed(self._plain())

    @cached_property
    def _transposed(self) -> Tensor:
        return _packed(self._plain().t())

    def _plain(self) -> Tensor:
        weights = [_out_by_in(layer)[self._words] for layer in self._layers]
        return torch.cat(weights) if len(weights) > 1 else weights[0]


class PackedForward(PackedWeight):
    """Stands in for the forward pass of one layer.

    With `packed_elsewhere` its weight is a part of other copies, and a second one is not made: when it is called, the
    layer does what it always did.
    """

    def __init__(self, layer: Layer):
        super().__init__(layer)
        self.packed_elsewhere = False
        self.layer, self.own, self.dtype = layer, layer.forward, layer.weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed_elsewhere or x.dtype != self.dtype or torch.is_autocast_enabled("cpu"):
            return self.own(x)
        # reshaped outside of the function: what it returns may be changed in place
        rows = _PackedProduct.apply(x.reshape(-1, x.shape[-1]), self)
        return rows.view(*x.shape[:-1], rows.shape[-1])

    @cached_property
    def tiles(self) -> list[PackedWeight]:
        return [PackedWeight(self.layer, words=words) for words in _tiles(len(_out_by_in(self.layer)))]


class _PackedProduct(torch.autograd.Function):
    """A layer on [rows, in]; no gradient but that of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedWeight) -> Tensor:
        ctx.layer = layer
        return layer.forth(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.layer.back(grad_outputs[0]), None


def head_tiles(head: nn.Linear) -> Sequence[FrozenWeight | PackedWeight]:
    """A head's outputs, `TILE` words at a time; packed ones where it is packed."""
    if isinstance(head.forward, PackedForward):
        return head.forward.tiles
    weight, bias = head.weight.detach(), head.bias
    return [
        FrozenWeight(weight[words], None if bias is None else bias.detach()[words]) for words in _tiles(len(weight))
    ]


def _tiles(words: int) -> list[slice]:
    return [slice(start, start + TILE) for start in range(0, words, TILE)]


def _out_by_in(layer: Layer) -> Tensor:
    weight = layer.weight.detach()
    return weight if isinstance(layer, nn.Linear) else weight.t()


def _packed(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)


def packable_dtypes() -> tuple[torch.dtype, ...]:
    """What this machine's oneDNN has products in."""
    if not torch.backends.mkldnn.is_available():
        return ()
    half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if half else (torch.float32,)
