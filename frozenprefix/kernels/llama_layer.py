"""A frozen decoder layer of the Llama family as one autograd function with a hand-written backward pass, for a CPU.

Autograd records every operation of such a layer and keeps a result for each. In a frozen layer only the input needs a
gradient, so most of that is not needed. This file computes the same layer

    x ── norm ── q, k, v ── rotary ── attention ── o ──(+ x)── norm ── gate, up ── silu(gate) * up ── down ──(+)── out

with these savings:

- one product for q, k and v, and one for gate and up, because each group reads the same input;
- results that are not read again are overwritten in place;
- for the backward pass are kept: the layer's input, the input of the second norm, the mean squares of both, the input
  of the activation, and the heads and weights of the attention. The normed inputs are not kept, because only a weight's
  gradient would read them.

The backward pass goes through the same steps from right to left. Residual sums pass the gradient on unchanged, so each
block adds its own contribution to the gradient that came in. Where the layer's own code rounds twice, this may round
once. `benchmarks/products.py` compares the two.

Texts that grow in a cache go through these layers without a gradient, in `llama_reading.py`.

Shape letters: R rows, T tokens in a row, N = R * T, D width, H query heads and G key heads of width d, F inner width.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from frozenprefix.kernels import compat
from frozenprefix.kernels.attention import MATMUL
from frozenprefix.kernels.compat import CACHE
from frozenprefix.kernels.linear import PrepackedForward, PrepackedWeight

# decoder layer -> its attention, feed-forward part and norm
FAMILIES = {
    llama.LlamaDecoderLayer: (llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm),
    mistral.MistralDecoderLayer: (mistral.MistralAttention, mistral.MistralMLP, mistral.MistralRMSNorm),
    qwen2.Qwen2DecoderLayer: (qwen2.Qwen2Attention, qwen2.Qwen2MLP, qwen2.Qwen2RMSNorm),
}


class FrozenLayer:
    """Replacement for the `forward` of one frozen decoder layer.

    It handles training passes over packed rows. For everything else it calls the layer's own `forward`: with a cache,
    under autocast, and when a hook is registered inside the layer. (transformers leaves such hooks behind once hidden
    states or attention weights were asked for.)

    Args:
        layer: a supported layer (see `frozen_layers`) whose linear layers have a `PrepackedForward`.
    """

    def __init__(self, layer: Any):
        # the method of the class, which an instance of `FrozenLayer` will replace
        self.own, self.layer = layer.forward, layer
        attention = layer.self_attn
        self.dim, self.scaling = attention.head_dim, attention.scaling
        self.queries = attention.q_proj.out_features // self.dim
        self.keys = attention.k_proj.out_features // self.dim
        self.out, self.down = attention.o_proj.forward, layer.mlp.down_proj.forward
        # q, k and v are multiplied as one matrix, and so are gate and up: two copies of them would be needless
        self.keep_copies(True)

    def keep_copies(self, here: bool) -> None:
        """Keep the prepacked copies of q, k, v, gate and up `here`, joined, or in each of these layers."""
        attention, mlp = self.layer.self_attn, self.layer.mlp
        for part in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            part.forward.copied_elsewhere = here

    @cached_property
    def query_key_value(self) -> PrepackedWeight:
        attention = self.layer.self_attn
        return PrepackedWeight(attention.q_proj, attention.k_proj, attention.v_proj)

    @cached_property
    def gate_up(self) -> PrepackedWeight:
        return PrepackedWeight(self.layer.mlp.gate_proj, self.layer.mlp.up_proj)

    def __call__(
        self,
        hidden_states: Tensor,
        *args: Any,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if (
            # not called as transformers' model calls it for packed rows
            args
            or attention_mask is None
            or position_embeddings is None
            # keys and values in a cache; this package's own search calls `llama_reading.read_tokens` instead
            or kwargs.get(CACHE) is not None
            # another attention than the one that `_attend` computes
            or compat.attention_implementation(self.layer.self_attn.config) != MATMUL
            # the weights were prepacked for one dtype
            or hidden_states.dtype != self.out.dtype
            or torch.is_autocast_enabled("cpu")
            # a hook reads or changes values inside the layer
            or any(map(compat.has_hooks, self._parts))
        ):
            return self.own(
                hidden_states, *args, attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs
            )
        return self.compute(hidden_states, attention_mask, position_embeddings)

    def compute(self, hidden_states: Tensor, mask: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """float[R, T, D] -> float[R, T, D] by the one function.

        Args:
            mask: additive float[R or 1, 1, T, T].
            position_embeddings: cosine and sine of the rotary positions, float[R, T, d] each.
        """
        shape = hidden_states.shape
        # Reshaped outside of the autograd function, whose result may then be changed in place, as a hook may do.
        rows = hidden_states.reshape(-1, shape[-1])
        return _LayerFunction.apply(rows, self, shape[:2], *position_embeddings, mask).view(shape)

    @cached_property
    def _parts(self) -> list[nn.Module]:
        return [module for module in self.layer.modules() if module is not self.layer]


def frozen_layers(language_model: nn.Module) -> list[FrozenLayer]:
    """Return a `FrozenLayer` for each decoder layer that can have one.

    The linear layers must have their `PrepackedForward` already. One layer of each class is compared with its own
    `forward`: a release of transformers that changes the layer is found here, and the layers then stay as they are.

    Example:
        >>> frozen_layers(model.language_model)  # outside of prepacked_frozen_weights
        []
    """
    layers = [FrozenLayer(module) for module in language_model.modules() if _is_supported(module)]
    first_of_class = {type(frozen.layer): frozen for frozen in reversed(layers)}
    if all(_agrees_with_own(frozen) for frozen in first_of_class.values()):
        return layers
    for frozen in layers:
        frozen.keep_copies(False)
    return []


def _is_supported(layer: Any) -> bool:
    """Whether `layer` is frozen, prepacked, and in every part what `_LayerFunction` computes."""
    if type(layer) not in FAMILIES or any(parameter.requires_grad for parameter in layer.parameters()):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    if any((type(attention), type(mlp), type(norm)) != FAMILIES[type(layer)] for norm in norms):
        return False
    if attention.attention_dropout or not isinstance(mlp.act_fn, nn.SiLU | SiLUActivation):
        return False
    if any("forward" in vars(part) for part in (layer, attention, mlp, *norms)):
        return False
    joined = [(attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)]
    linear = [*joined[0], *joined[1], attention.o_proj, mlp.down_proj]
    if not all(isinstance(vars(part).get("forward"), PrepackedForward) for part in linear):
        return False
    # weights that become one need a bias in all of them or in none
    return all(len({part.bias is None for part in group}) == 1 for group in joined)


@torch.no_grad()
def _agrees_with_own(frozen: FrozenLayer) -> bool:
    """Compare the function with the layer's own `forward` on one row of two tokens."""
    name, unchanged = type(frozen.layer).__name__, "decoder layers keep their own forward pass"
    dtype, width = frozen.out.dtype, frozen.layer.self_attn.o_proj.out_features
    hidden = torch.arange(2.0 * width).sin().view(1, 2, width).to(dtype)
    angles = torch.arange(2.0).view(1, 2, 1).expand(1, 2, frozen.dim)
    positions, mask = (angles.cos().to(dtype), angles.sin().to(dtype)), torch.zeros(1, 1, 2, 2, dtype=dtype)
    try:
        own = frozen.own(hidden, attention_mask=mask, position_embeddings=positions)
        difference = (frozen.compute(hidden, mask, positions) - own).float().norm() / own.float().norm()
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        compat.say_once(f"{unchanged}: {name} failed on two tokens ({error})")
        return False
    if difference > (1e-4 if dtype == torch.float32 else 0.05):
        compat.say_once(f"{unchanged}: the result differs from that of {name} by {difference:.0e}")
        return False
    return True


class _LayerFunction(torch.autograd.Function):
    """[N, D] -> [N, D]; only the hidden states get a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen: FrozenLayer, shape: torch.Size, cos: Tensor, sin: Tensor, mask: Tensor
    ) -> Tensor:
        layer = frozen.layer
        normed, variance = _norm(x, layer.input_layernorm)
        # [N, D] -> [R, T, H + 2 G, d]: query, key and value heads side by side
        heads = frozen.query_key_value.forward(normed).view(*shape, -1, frozen.dim)
        signed_sin = signed_sine(sin)
        # queries and keys are rotated where they are; values, the last heads, stay as they are
        rotate(heads[:, :, : frozen.queries + frozen.keys], cos, signed_sin)
        mixed, *attention = _attend(heads, frozen, mask)
        # [N, H d] -> [N, D]
        middle = frozen.out.forward(mixed).add_(x)
        normed, middle_variance = _norm(middle, layer.post_attention_layernorm)
        # [N, D] -> [N, 2 F] -> [N, D]
        inner = frozen.gate_up.forward(normed)
        gate, up = inner.chunk(2, dim=-1)
        output = frozen.down.forward(F.silu(gate).mul_(up)).add_(middle)
        ctx.frozen, ctx.shape = frozen, shape
        # None of these may be overwritten above: `inner`, unlike its activation, is read again in the backward pass.
        ctx.save_for_backward(x, variance, middle, middle_variance, inner, cos, signed_sin, *attention)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, variance, middle, middle_variance, inner, cos, signed_sin, *attention = ctx.saved_tensors
        frozen, layer, grad_output = ctx.frozen, ctx.frozen.layer, grad_outputs[0]
        # Feed-forward part. With a = silu(gate) * up: d up = silu(gate) * da and d gate = silu'(gate) * up * da, both
        # written into one tensor, so that one product leads back through gate and up.
        gate, up = inner.chunk(2, dim=-1)
        grad = frozen.down.backward(grad_output)
        grad_inner = torch.empty_like(inner)
        grad_gate, grad_up = grad_inner.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
        grad = frozen.gate_up.backward(grad_inner)
        # `middle` went two ways, through this part and around it: both gradients add up
        grad = _norm_backward(grad, middle, middle_variance, layer.post_attention_layernorm).add_(grad_output)
        # Attention. A rotation is undone by the opposite rotation, so the gradient of queries and keys is turned back.
        grad_mixed = frozen.out.backward(grad)
        grad_heads = _attend_backward(grad_mixed.view(*ctx.shape, -1, frozen.dim), frozen, *attention)
        rotate(grad_heads[:, :, : frozen.queries + frozen.keys], cos, signed_sin, inverse=True)
        grad_normed = frozen.query_key_value.backward(grad_heads.view(len(x), -1))
        grad = _norm_backward(grad_normed, x, variance, layer.input_layernorm).add_(grad)
        return grad, None, None, None, None, None


def _norm(x: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """RMS norm: [N, D] -> x / rms(x) * weight, and the mean squares float32[N] for the backward pass.

    Batch norm in evaluation mode divides every channel by the root of a given variance, in one pass, in float32, and
    rounds once. Here the N rows are its channels: mean 0 and the mean square as the variance make it the RMS norm.
    """
    variance = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square_().div_(x.shape[-1])
    normed = torch.batch_norm(
        x.unsqueeze(0), None, None, torch.zeros_like(variance), variance, False, 0.0, norm.variance_epsilon, False
    )
    return normed.squeeze(0).mul_(norm.weight), variance


def _norm_backward(grad: Tensor, x: Tensor, variance: Tensor, norm: Any) -> Tensor:
    """Gradient of x through `_norm`: [N, D] -> [N, D].

    torch has a one-pass kernel for layer norm only. With mean 0 it gives the RMS norm's gradient, minus the mean of
    `grad * weight` over the row, which is what centring adds; that is added back.
    """
    scale = (variance + norm.variance_epsilon).rsqrt_()
    zero = torch.zeros_like(scale).unsqueeze(1)
    grad_x = torch.ops.aten.native_layer_norm_backward(
        grad, x, [x.shape[-1]], zero, scale.unsqueeze(1), norm.weight.float(), None, [True, False, False]
    )[0]
    mean = torch.mv(grad, norm.weight).float().mul_(scale).div_(x.shape[-1])
    return grad_x.add_(mean.to(grad_x.dtype).unsqueeze(1))


def signed_sine(sin: Tensor) -> Tensor:
    """The sine with the minus of the rotation in it, so that both halves are one multiply-add.

    Example:
        >>> signed_sine(torch.ones(2)).tolist()
        [-1.0, 1.0]
    """
    half = sin.shape[-1] // 2
    return torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)


def rotate(heads: Tensor, cos: Tensor, signed_sin: Tensor, *, inverse: bool = False) -> None:
    """Turn heads by their rotary positions, in place: heads [R, T, heads, d]; cos and signed_sin [R, T, d].

    Channel i of the first half and channel i of the second half form a pair, turned by one angle. For d = 4:

        heads       a   b   c   d
        swapped     c   d   a   b
        signed_sin -s  -s   s   s
        result   a cos - c s,  b cos - d s,  c cos + a s,  d cos + b s

    The inverse, which the gradient needs, turns by the negative angle: the sine changes its sign.

    Example:
        >>> heads, ones = torch.tensor([[[[1.0, 0.0]]]]), torch.ones(1, 1, 2)
        >>> rotate(heads, 0 * ones, signed_sine(ones))  # a quarter turn
        >>> heads.tolist()
        [[[[0.0, 1.0]]]]
    """
    first, second = heads.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    heads.mul_(cos.unsqueeze(2)).addcmul_(swapped, signed_sin.unsqueeze(2), value=-1.0 if inverse else 1.0)


def _attend(heads: Tensor, frozen: FrozenLayer, mask: Tensor) -> tuple[Tensor, ...]:
    """[R, T, H + 2 G, d] -> mixed values [N, H d], and query, key, value and weights, their first dimension R G.

    Query heads that share a key head become more rows of one product, so that keys and values are not repeated. With
    H = 4 and G = 2, heads 0 and 1 read key head 0: their 2 T queries are the rows of one [2 T, d] @ [d, T].
    """
    rows, length, _, dim = heads.shape
    queries, keys, values = heads.split((frozen.queries, frozen.keys, frozen.keys), dim=2)
    query = _grouped(queries, frozen.keys, frozen.scaling)
    key, value = (part.transpose(1, 2).reshape(-1, length, dim) for part in (keys, values))
    # The queries were scaled while they were copied, which is cheaper than scaling T * T scores.
    # [R G, H/G T, d] @ [R G, d, T]
    scores = torch.bmm(query, key.transpose(1, 2))
    scores.view(rows, frozen.queries, length, length).add_(mask)
    weights = torch.softmax(scores, dim=-1, out=scores)
    mixed = torch.bmm(weights, value).view(rows, frozen.queries, length, dim)
    return mixed.transpose(1, 2).reshape(rows * length, -1), query, key, value, weights


def _attend_backward(
    grad: Tensor, frozen: FrozenLayer, query: Tensor, key: Tensor, value: Tensor, weights: Tensor
) -> Tensor:
    """Gradient of the heads: [R, T, H, d] -> [R, T, H + 2 G, d], written part by part into one tensor.

    With A = softmax(S), S = Q K^T and O = A V:
    dV = A^T dO,  dA = dO V^T,  dS = softmax'(dA),  dQ = dS K,  dK = dS^T Q.
    """
    rows, length, _, dim = grad.shape
    # The sum over the query heads that share a key head comes with the product: they are rows of one matrix.
    grad = _grouped(grad, frozen.keys, 1.0)
    grad_heads = grad.new_empty(rows, length, frozen.queries + 2 * frozen.keys, dim)
    queries, keys, values = grad_heads.split((frozen.queries, frozen.keys, frozen.keys), dim=2)
    values.copy_(torch.bmm(weights.transpose(1, 2), grad).view(rows, frozen.keys, length, dim).transpose(1, 2))
    grad_scores = compat.softmax_backward(torch.bmm(grad, value.transpose(1, 2)), weights)
    keys.copy_(torch.bmm(grad_scores.transpose(1, 2), query).view(rows, frozen.keys, length, dim).transpose(1, 2))
    grad_query = torch.bmm(grad_scores, key).view(rows, frozen.queries, length, dim).transpose(1, 2)
    torch.mul(grad_query, frozen.scaling, out=queries)
    return grad_heads


def _grouped(heads: Tensor, groups: int, scaling: float) -> Tensor:
    """[R, T, H, d] -> [R G, H/G T, d], scaled on the way, in one copy."""
    rows, length, count, dim = heads.shape
    grouped = heads.new_empty(rows, count, length, dim)
    torch.mul(heads.transpose(1, 2), scaling, out=grouped)
    return grouped.view(rows * groups, -1, dim)
