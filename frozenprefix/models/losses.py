"""Cross-entropy over a large vocabulary without a [tokens x vocabulary] matrix that outlives its chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 256  # rows of logits at a time: large enough for the matrix product, small enough to stay near the caches


class _FrozenHeadLoss(torch.autograd.Function):
    """Sum of weighted cross-entropies through a head that is not trained.

    The gradient of the hidden states is computed in the forward pass, chunk by chunk, while the logits are there; the
    backward pass scales it. The head itself gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor, label: Tensor, count: Tensor
    ) -> Tensor:
        order = torch.argsort(source, stable=True)
        source, label, count = source[order], label[order], count[order]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), CHUNK):
            rows = hidden[start : start + CHUNK]
            low, high = torch.searchsorted(source, torch.tensor([start, start + len(rows)], device=source.device)).tolist()
            at, wanted, times = source[low:high] - start, label[low:high], count[low:high]
            logits = nn.functional.linear(rows, weight, bias).float()
            normaliser = logits.logsumexp(dim=-1)
            loss += (times * (normaliser[at] - logits[at, wanted])).sum()
            if gradient is not None:
                per_row = torch.zeros_like(normaliser).index_add_(0, at, times)
                logits.sub_(normaliser[:, None]).exp_().mul_(per_row[:, None])
                logits.index_put_((at, wanted), -times, accumulate=True)
                gradient[start : start + CHUNK] = logits.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None, None, None


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
        return _FrozenHeadLoss.apply(hidden, head.weight, head.bias, source, label, count)
    logits = head(hidden).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (count * (logits.logsumexp(dim=-1)[source] - logits[source, label])).sum()
