"""Cross-entropy over a large vocabulary, of which only one tile of logits exists at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from frozenprefix.kernels.linear import TILE, PlainWeight, PrepackedWeight, head_tiles
from frozenprefix.models.language_model.loading import cap

ROWS = 512  # hidden states at a time: their logits for `TILE` words stay near the caches


class _FrozenHeadLoss(torch.autograd.Function):
    """Sum of weighted cross-entropies through a head that is not trained.

    Logits are made tile by tile and forgotten. The gradient of the hidden states is computed on the way; the backward
    pass scales it. The head itself gets no gradient. Logits stay in the head's dtype, for passes over them cost as much
    as the matrix products; sums are float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: nn.Linear,
        source: Tensor,
        label: Tensor,
        count: Tensor,
        softcap: float | None,
    ) -> Tensor:
        tiles = head_tiles(head)
        order, spans = _by_tile(source, label, len(hidden), len(tiles))
        source, label, count = source[order], label[order], count[order]
        per_row = torch.zeros(len(hidden), 1, device=hidden.device).index_add_(0, source, count[:, None])
        wanted = torch.empty_like(count)  # logits of the labels
        normaliser = torch.empty(len(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for block, start in enumerate(range(0, len(hidden), ROWS)):
            rows = slice(start, start + ROWS)
            softmax = _RunningSoftmax(hidden[rows], softcap, back=gradient is not None)
            for number, (tile, edges) in enumerate(zip(tiles, spans[block], strict=True)):
                logits = tile.forward(hidden[rows])
                if softcap is not None:
                    logits = cap(logits.float(), softcap)
                wanted[edges] = logits[source[edges] - start, label[edges] - number * TILE].float()
                softmax.add(logits, tile)
                del logits  # before the next tile's are made
            normaliser[rows] = softmax.log_total()
            if gradient is not None:
                edges = slice(spans[block][0].start, spans[block][-1].stop)
                weights = count[edges]
                if softcap is not None:
                    weights = weights * _slope(wanted[edges], softcap)
                taken = head.weight[label[edges]].float() * weights[:, None]
                expected = softmax.expected() * per_row[rows]
                gradient[rows] = expected.index_add_(0, source[edges] - start, taken, alpha=-1)
        ctx.save_for_backward(gradient)
        return (count * (normaliser[source] - wanted)).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None, None, None


class _RunningSoftmax:
    """Softmax over words that come tile by tile, and the row of the head that it expects.

    What was summed is scaled down when a larger logit turns up, as in FlashAttention (Dao et al. 2022, section 3.1).
    """

    def __init__(self, hidden: Tensor, softcap: float | None, *, back: bool):
        self._softcap, self._dtype = softcap, hidden.dtype
        self._highest = torch.full((len(hidden), 1), -torch.inf, device=hidden.device)
        self._total = torch.zeros_like(self._highest)
        self._back = back
        self._summed = torch.zeros(hidden.shape if back else 0, device=hidden.device)

    def add(self, logits: Tensor, tile: PlainWeight | PrepackedWeight) -> None:
        """The next tile's logits, capped, float[rows, words], which are overwritten."""
        slope = None if self._softcap is None else _slope(logits, self._softcap)
        highest = torch.maximum(self._highest, logits.amax(dim=-1, keepdim=True).float())
        scale = (self._highest - highest).exp_()
        shares = logits.sub_(highest.to(logits.dtype)).exp_()
        self._highest = highest
        self._total.mul_(scale).add_(shares.sum(dim=-1, keepdim=True, dtype=torch.float32))
        if self._back:
            shares = shares if slope is None else shares.mul_(slope).to(self._dtype)
            self._summed.mul_(scale).add_(tile.backward(shares))

    def log_total(self) -> Tensor:
        """Log of the sum of all exponentials: float32[rows]."""
        return (self._highest + self._total.log()).squeeze(1)

    def expected(self) -> Tensor:
        """Mean of the head's rows, weighted with the probabilities: float32[rows, D]."""
        return self._summed / self._total


def _slope(capped: Tensor, softcap: float) -> Tensor:
    """Derivative of `cap`, by its result."""
    return 1.0 - (capped / softcap).square()


def _by_tile(source: Tensor, label: Tensor, rows: int, tiles: int) -> tuple[Tensor, list[list[slice]]]:
    """An order of the edges, and where in it those of each block of rows and of each tile lie."""
    key = source.div(ROWS, rounding_mode="floor") * tiles + label.div(TILE, rounding_mode="floor")
    key, order = key.sort(stable=True)
    blocks = -(-rows // ROWS)
    ends = torch.searchsorted(key, torch.arange(1, blocks * tiles + 1, device=key.device)).tolist()
    spans = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return order, [spans[block * tiles : (block + 1) * tiles] for block in range(blocks)]


def next_token_loss(
    hidden: Tensor, head: nn.Module, source: Tensor, label: Tensor, count: Tensor, softcap: float | None = None
) -> Tensor:
    """Sum over edges of `count * -log p(label | hidden[source])`.

    Args:
        hidden: float[K, D], last hidden states of the nodes that predict something.
        head: the LM's output layer, `head(hidden) -> float[K, V]`.
        source, label: int64[E]; count: float32[E].
        softcap: Gemma 2's cap on logits.

    Returns:
        float32 scalar, not averaged.
    """
    frozen = isinstance(head, nn.Linear) and not any(p.requires_grad for p in head.parameters())
    if frozen:
        return _FrozenHeadLoss.apply(hidden, head, source, label, count, softcap)
    logits = cap(head(hidden).float(), softcap)
    return (count * (logits.logsumexp(dim=-1)[source] - logits[source, label])).sum()
