"""Products with frozen weights in the layout that oneDNN's matrix products use.

oneDNN brings a weight into its own layout before every product. A frozen weight can be brought there once, which is
called prepacking: one copy for the forward pass and one for the gradient of the input, beside the weight itself, which
stays as it is. In float32 PyTorch uses MKL for its own products, which is the slower of the two on AMD processors
(`benchmarks/products.py`).
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

from frozenprefix.kernels import compat

# oneDNN chooses a layout for a number of rows. It is always this one, so that a resumed run gives the same bits.
LAYOUT_ROWS = 512
# oneDNN compiles a kernel for every number of rows and keeps it, so rows are padded to multiples of this: a training
# with rows of all lengths would otherwise grow by gigabytes (`benchmarks/memory.py`). Fewer rows, as when a few texts
# grow by a word each, are not padded: such a product takes as long as its weights are read.
ROW_MULTIPLE = 32
TILE = 8192  # outputs of a head (words of the vocabulary) that are computed at a time
Layer = nn.Linear | Conv1D


def prepackable_dtypes() -> tuple[torch.dtype, ...]:
    """Dtypes in which this machine's oneDNN has products with prepacked weights; empty without oneDNN.

    Example:
        >>> set(prepackable_dtypes()) <= {torch.float32, torch.bfloat16}
        True
    """
    if not torch.backends.mkldnn.is_available():
        return ()
    if _operator("_linear_pointwise") is None or _operator("_reorder_linear_weight") is None:
        return ()
    supports_bfloat16 = _operator("_is_mkldnn_bf16_supported")
    if supports_bfloat16 is None or not supports_bfloat16():
        return (torch.float32,)
    return (torch.float32, torch.bfloat16)


class PlainWeight:
    """Weight in PyTorch's layout, for use inside an autograd function: the plain path of `PrepackedWeight`.

    Example:
        >>> PlainWeight(torch.ones(3, 2), None).forward(torch.ones(1, 2)).tolist()
        [[2.0, 2.0, 2.0]]
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias: [rows, in] -> [rows, out]."""
        return F.linear(x, self.weight, self.bias)

    def backward(self, grad: Tensor) -> Tensor:
        """Gradient of x: [rows, out] -> [rows, in]."""
        return grad @ self.weight


class PrepackedWeight:
    """Prepacked weights of one layer, or of several that read the same input, as one; copied at the first use.

    Args:
        layers: either all of them have a bias or none has.
        outputs: the part of each layer's outputs to use; all of them by default.

    Example:
        >>> weight = PrepackedWeight(torch.nn.Linear(4, 2), torch.nn.Linear(4, 3))
        >>> weight.forward(torch.ones(5, 4)).shape
        torch.Size([5, 5])
    """

    def __init__(self, *layers: Layer, outputs: slice = slice(None)):
        self._layers, self._outputs = layers, outputs
        biases = [layer.bias.detach()[outputs] for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias: [rows, in] -> [rows, out]."""
        return _linear(x, self._weight, self.bias)

    def backward(self, grad: Tensor) -> Tensor:
        """Gradient of x: [rows, out] -> [rows, in]."""
        return _linear(grad, self._transposed, None)

    @cached_property
    def _weight(self) -> Tensor:
        return _prepack(self._plain())

    @cached_property
    def _transposed(self) -> Tensor:
        return _prepack(self._plain().t())

    def _plain(self) -> Tensor:
        weights = [_weight_of(layer)[self._outputs] for layer in self._layers]
        return torch.cat(weights) if len(weights) > 1 else weights[0]


class PrepackedForward(PrepackedWeight):
    """Replacement for the `forward` of one frozen layer.

    Under autocast and for inputs of another dtype the layer's own `forward` runs. So it does while `copied_elsewhere`
    is set: then the weight is part of another prepacked copy, and needs no second one.
    """

    def __init__(self, layer: Layer):
        super().__init__(layer)
        self.copied_elsewhere = False
        self.layer, self.own, self.dtype = layer, layer.forward, layer.weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        if self.copied_elsewhere or x.dtype != self.dtype or torch.is_autocast_enabled("cpu"):
            return self.own(x)
        # Reshaped outside of the autograd function, whose result may then be changed in place, as AdaLoRA does.
        rows = _PrepackedProduct.apply(x.reshape(-1, x.shape[-1]), self)
        return rows.view(*x.shape[:-1], rows.shape[-1])

    @cached_property
    def tiles(self) -> list[PrepackedWeight]:
        """The layer's outputs in parts of `TILE`."""
        return [PrepackedWeight(self.layer, outputs=outputs) for outputs in _tiles(len(_weight_of(self.layer)))]


class _PrepackedProduct(torch.autograd.Function):
    """Apply a layer to [rows, in]; only the input gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PrepackedWeight) -> Tensor:
        ctx.weight = weight
        return weight.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.weight.backward(grad_outputs[0]), None


def head_tiles(head: nn.Linear) -> Sequence[PlainWeight | PrepackedWeight]:
    """Split a language model's head into parts of `TILE` words; prepacked ones where the head is prepacked.

    Example:
        >>> len(head_tiles(torch.nn.Linear(4, 3 * TILE + 1)))
        4
    """
    if isinstance(head.forward, PrepackedForward):
        return head.forward.tiles
    weight, bias = head.weight.detach(), head.bias
    return [PlainWeight(weight[words], None if bias is None else bias.detach()[words]) for words in _tiles(len(weight))]


def _tiles(outputs: int) -> list[slice]:
    return [slice(start, start + TILE) for start in range(0, outputs, TILE)]


def _weight_of(layer: Layer) -> Tensor:
    """[out, in]; a Conv1D holds it transposed."""
    weight = layer.weight.detach()
    return weight if isinstance(layer, nn.Linear) else weight.t()


def _operator(name: str) -> Any:
    return compat.private(torch.ops.mkldnn, name, "frozen weights are not prepacked")


def _prepack(weight: Tensor) -> Tensor:
    return _operator("_reorder_linear_weight")(weight.contiguous(), LAYOUT_ROWS)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, width = x.shape
    padding = -rows % ROW_MULTIPLE if rows > ROW_MULTIPLE else 0
    if padding:
        x = torch.cat([x, x.new_zeros(padding, width)])
    output = _operator("_linear_pointwise")(x.contiguous(), weight, bias, "none", [], "")
    # Cut in place: a slice would be a view, which an autograd function must not return.
    return output.resize_(rows, output.shape[1]) if padding else output
