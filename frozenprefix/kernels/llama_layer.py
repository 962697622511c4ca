"""A frozen decoder layer of the Llama family as one function with its backward pass written out, for a CPU.

Autograd records every operation of such a layer, with a result of its own. A layer that is frozen needs no gradient but
that of its input: less is kept, results are overwritten, and products that read the same input are one. The mathematics
is that of the layer; where it rounds twice, this may round once. `benchmarks/products.py` compares.

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

from frozenprefix.kernels.attention import NAME
from frozenprefix.kernels.compat import CACHE, has_global_hooks
from frozenprefix.kernels.linear import PackedForward, PackedWeight

# layers, and what they are made of: attention, gated layer, norms
KNOWN = {
    llama.LlamaDecoderLayer: (llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm),
    mistral.MistralDecoderLayer: (mistral.MistralAttention, mistral.MistralMLP, mistral.MistralRMSNorm),
    qwen2.Qwen2DecoderLayer: (qwen2.Qwen2Attention, qwen2.Qwen2MLP, qwen2.Qwen2RMSNorm),
}


class PackedLayer:
    """Stands in for the forward pass of one layer, which does itself what this does not: caches, hooks, autocast.

    Hooks on a layer's parts count, and transformers leaves some behind once hidden states or attentions were asked for.
    """

    def __init__(self, layer: Any):
        self.own, self.layer = layer.forward, layer
        attention = layer.self_attn
        self.dim, self.scaling = attention.head_dim, attention.scaling
        self.queries, self.keys = (part.out_features // self.dim for part in (attention.q_proj, attention.k_proj))
        self.out, self.down = attention.o_proj.forward, layer.mlp.down_proj.forward
        for part in (attention.q_proj, attention.k_proj, attention.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
            part.forward.packed_elsewhere = True

    @cached_property
    def query_key_value(self) -> PackedWeight:
        attention = self.layer.self_attn
        return PackedWeight(attention.q_proj, attention.k_proj, attention.v_proj)

    @cached_property
    def gate_up(self) -> PackedWeight:
        return PackedWeight(self.layer.mlp.gate_proj, self.layer.mlp.up_proj)

    def __call__(
        self,
        hidden_states: Tensor,
        *args: Any,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if (
            args
            or attention_mask is None
            or position_embeddings is None
            or kwargs.get(CACHE) is not None
            or self.layer.self_attn.config._attn_implementation != NAME
            or hidden_states.dtype != self.out.dtype
            or torch.is_autocast_enabled("cpu")
            or has_global_hooks()
            or any(map(_has_hooks, self._parts))
        ):
            return self.own(
                hidden_states,
                *args,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        shape = hidden_states.shape
        # reshaped outside of the function: what it returns may be changed in place
        rows = hidden_states.reshape(-1, shape[-1])
        return _LayerFunction.apply(rows, self, shape[:2], *position_embeddings, attention_mask).view(shape)

    @cached_property
    def _parts(self) -> list[nn.Module]:
        return [module for module in self.layer.modules() if module is not self.layer]


def is_plain(layer: Any) -> bool:
    """Whether a layer can be had as a `PackedLayer`, its linear layers having their `PackedForward` already."""
    if type(layer) not in KNOWN or any(parameter.requires_grad for parameter in layer.parameters()):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    if any((type(attention), type(mlp), type(norm)) != KNOWN[type(layer)] for norm in norms):
        return False
    linear = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linear += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if not all(isinstance(vars(part).get("forward"), PackedForward) for part in linear):
        return False
    own = all("forward" not in vars(part) for part in (layer, attention, mlp, *norms))
    alike = len({part.bias is None for part in linear[:3]}) == len({part.bias is None for part in linear[4:6]}) == 1
    return own and alike and not attention.attention_dropout and isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation))


def _has_hooks(module: nn.Module) -> bool:
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(kinds)


class _LayerFunction(torch.autograd.Function):
    """[N, D] -> [N, D]; no gradient but that of the hidden states."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parts: PackedLayer, shape: torch.Size, cos: Tensor, sin: Tensor, mask: Tensor
    ) -> Tensor:
        layer = parts.layer
        normed, variance = _norm(x, layer.input_layernorm)
        # [N, (H + 2 G) d] -> [R, T, H + 2 G, d]
        heads = parts.query_key_value.forth(normed).view(*shape, -1, parts.dim)
        half = parts.dim // 2
        turn = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        _rotate(heads[:, :, : parts.queries + parts.keys], cos, turn)
        mixed, *attended = _attend(heads, parts, mask)
        middle = parts.out.forth(mixed).add_(x)
        normed, middle_variance = _norm(middle, layer.post_attention_layernorm)
        inner = parts.gate_up.forth(normed)
        gate, up = inner.chunk(2, dim=-1)
        made = parts.down.forth(F.silu(gate).mul_(up)).add_(middle)
        ctx.parts, ctx.shape = parts, shape
        ctx.save_for_backward(x, variance, middle, middle_variance, inner, cos, turn, *attended)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, variance, middle, middle_variance, inner, cos, turn, *attended = ctx.saved_tensors
        parts, layer, given = ctx.parts, ctx.parts.layer, grad_outputs[0]
        # through the gated layer
        gate, up = inner.chunk(2, dim=-1)
        grad = parts.down.back(given)
        grad_inner = torch.empty_like(inner)
        grad_gate, grad_up = grad_inner.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
        grad = parts.gate_up.back(grad_inner)
        grad = _norm_backward(grad, middle, middle_variance, layer.post_attention_layernorm).add_(given)
        # through the attention
        grad_mixed = parts.out.back(grad)
        grad_heads = _attend_backward(grad_mixed.view(*ctx.shape, -1, parts.dim), parts, *attended)
        _rotate(grad_heads[:, :, : parts.queries + parts.keys], cos, turn, back=True)
        grad_normed = parts.query_key_value.back(grad_heads.view(len(x), -1))
        grad = _norm_backward(grad_normed, x, variance, layer.input_layernorm).add_(grad)
        return grad, None, None, None, None, None


def _norm(x: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """[N, D] -> its rows over their root mean square, times the norm's weight; and their mean squares float32[N]."""
    variance = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square_().div_(x.shape[-1])
    # scales rows in float32 and rounds once: rows are its channels
    normed = torch.batch_norm(
        x.unsqueeze(0), None, None, torch.zeros_like(variance), variance, False, 0.0, norm.variance_epsilon, False
    )
    return normed.squeeze(0).mul_(norm.weight), variance


def _norm_backward(grad: Tensor, x: Tensor, variance: Tensor, norm: Any) -> Tensor:
    """Gradient of x: that of a layer norm around 0, but for the mean, which a layer norm takes away."""
    scale = (variance + norm.variance_epsilon).rsqrt_()
    zero = torch.zeros_like(scale).unsqueeze(1)
    made = torch.ops.aten.native_layer_norm_backward(
        grad, x, [x.shape[-1]], zero, scale.unsqueeze(1), norm.weight.float(), None, [True, False, False]
    )[0]
    mean = torch.mv(grad, norm.weight).float().mul_(scale).div_(x.shape[-1])
    return made.add_(mean.to(made.dtype).unsqueeze(1))


def _rotate(heads: Tensor, cos: Tensor, turn: Tensor, *, back: bool = False) -> None:
    """Rotary positions, in place: [R, T, heads, d] by cos and turn [R, T, d], the sine with its first half negated."""
    first, second = heads.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    heads.mul_(cos.unsqueeze(2)).addcmul_(swapped, turn.unsqueeze(2), value=-1.0 if back else 1.0)


def _attend(heads: Tensor, parts: PackedLayer, mask: Tensor) -> tuple[Tensor, ...]:
    """[R, T, H + 2 G, d] -> mixed values [N, H d]; and what the way back needs, its first dimension R G."""
    rows, length, _, dim = heads.shape
    queries, keys, values = heads.split((parts.queries, parts.keys, parts.keys), dim=2)
    # query heads that share a key head become more rows of one product: [R G, H / G T, d]
    query = _grouped(queries, parts.keys, parts.scaling)
    key, value = (part.transpose(1, 2).reshape(-1, length, dim) for part in (keys, values))
    scores = torch.bmm(query, key.transpose(1, 2))
    scores.view(rows, parts.queries, length, length).add_(mask)
    weights = torch.softmax(scores, dim=-1, out=scores)
    mixed = torch.bmm(weights, value).view(rows, parts.queries, length, dim)
    return mixed.transpose(1, 2).reshape(rows * length, -1), query, key, value, weights


def _attend_backward(
    grad: Tensor, parts: PackedLayer, query: Tensor, key: Tensor, value: Tensor, weights: Tensor
) -> Tensor:
    """[R, T, H, d] -> [R, T, H + 2 G, d]."""
    rows, length, _, dim = grad.shape
    grad = _grouped(grad, parts.keys, 1.0)
    made = grad.new_empty(rows, length, parts.queries + 2 * parts.keys, dim)
    queries, keys, values = made.split((parts.queries, parts.keys, parts.keys), dim=2)
    values.copy_(torch.bmm(weights.transpose(1, 2), grad).view(rows, parts.keys, length, dim).transpose(1, 2))
    of_weights = torch.bmm(grad, value.transpose(1, 2))
    of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype, grad_input=of_weights)
    keys.copy_(torch.bmm(of_scores.transpose(1, 2), query).view(rows, parts.keys, length, dim).transpose(1, 2))
    of_query = torch.bmm(of_scores, key).view(rows, parts.queries, length, dim).transpose(1, 2)
    torch.mul(of_query, parts.scaling, out=queries)
    return made


def _grouped(heads: Tensor, groups: int, scaling: float) -> Tensor:
    """[R, T, H, d] -> [R G, H / G T, d], scaled."""
    rows, length, count, dim = heads.shape
    made = heads.new_empty(rows, count, length, dim)
    torch.mul(heads.transpose(1, 2), scaling, out=made)
    return made.view(rows * groups, -1, dim)
