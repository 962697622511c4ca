"""Cross-entropy over a large vocabulary without a [tokens x vocabulary] matrix that outlives its chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from frozenprefix.models.packed_weights import PackedForward, product

CHUNK = 256  # rows of logits at a time: large enough for the matrix product, small enough to stay near the caches


class _FrozenHeadLoss(torch.autograd.Function):
    """Sum of weighted cross-entropies through a head that is not trained.

    The gradient of the hidden states is computed in the forward pass, chunk by chunk, while the logits are there; the
    backward pass scales it. The head itself gets no gradient. Logits and probabilities stay in the head's dtype and in
    the same memory, for passes over them cost as much as the matrix products; all chunks share it unless the head is
    packed, when a product takes its own.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: nn.Linear, source: Tensor, label: Tensor, count: Tensor) -> Tensor:
        weight, packed = head.weight, head.forward if isinstance(head.forward, PackedForward) else None
        order = torch.argsort(source, stable=True)
        source, label, count = source[order], label[order], count[order]
        per_row = torch.zeros(len(hidden), device=hidden.device).index_add_(0, source, count)
        wanted = torch.empty_like(count)  # logits of the labels
        normaliser = torch.empty_like(per_row)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        memory = weight.new_empty(0 if packed else min(CHUNK, len(hidden)), len(weight))
        starts = list(range(0, len(hidden), CHUNK))
        ends = torch.searchsorted(source, torch.tensor(starts[1:], device=source.device)).tolist()
        for start, low, high in zip(starts, [0, *ends], [*ends, len(source)], strict=True):
            rows = slice(start, start + CHUNK)
            at, words = source[low:high] - start, label[low:high]
            if packed:
                logits = product(hidden[rows], packed.weight, head.bias)
            else:
                logits = torch.mm(hidden[rows], weight.t(), out=memory[: len(hidden[rows])])
                if head.bias is not None:
                    logits += head.bias
            wanted[low:high] = logits[at, words].float()
            highest = logits.amax(dim=-1).float()
            probabilities = torch.softmax(logits, dim=-1, out=logits)
            # the largest probability is exp(highest - normaliser)
            normaliser[rows] = highest - probabilities.amax(dim=-1).float().log()
            if gradient is not None:
                back = product(probabilities, packed.transposed) if packed else probabilities @ weight
                expected = back.float() * per_row[rows, None]
                taken = weight[words].float() * count[low:high, None]
                gradient[rows] = expected.index_add_(0, at, taken, alpha=-1)
            del logits, probabilities  # before the next chunk's are made
        ctx.save_for_backward(gradient)
        return (count * (normaliser[source] - wanted)).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None, None


def next_token_loss(
    hidden: Tensor, head: nn.Module, source: Tensor, label: Tensor, count: Tensor, softcap: float | None = None
) -> Tensor:
    """Sum over edges of `count * -log p(label | hidden[source])`.

    Args:
        hidden: float[K, D], last hidden states of the nodes that predict something.
        head: the LM's output layer, `head(hidden) -> float[K, V]`.
        source, label: int64[E]; count: float32[E].
        softcap: Gemma 2's cap on logits, `softcap * tanh(logits / softcap)`.

    Returns:
        float32 scalar, not averaged.
    """
    frozen = isinstance(head, nn.Linear) and not any(p.requires_grad for p in head.parameters())
    if frozen and softcap is None:
        return _FrozenHeadLoss.apply(hidden, head, source, label, count)
    logits = head(hidden).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (count * (logits.logsumexp(dim=-1)[source] - logits[source, label])).sum()
