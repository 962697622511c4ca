"""Next-token loss over a large vocabulary, with one tile of logits in memory at a time.

The loss of an edge (node, next token) is `log sum_v exp(logit_v) - logit_label`. Its gradient with respect to the
hidden state is `sum_v p_v * head_v - head_label`, where `head_v` is the head's row for word v and p the softmax. Both
are sums over the words, so the words are visited in tiles: the sums are kept up to date, and the logits of a tile are
dropped. Label smoothing (Szegedy et al. 2016, section 7) adds the mean of all logits, which is a sum over words, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from frozenprefix.kernels.linear import TILE, PlainWeight, PrepackedWeight, head_tiles

ROWS = 512  # hidden states at a time: their logits for `TILE` words stay near the caches


def next_token_loss(
    hidden: Tensor,
    head: nn.Module,
    source: Tensor,
    label: Tensor,
    weight: Tensor,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Sum over edges of `weight * -log p(label | hidden[source])`.

    Args:
        hidden: float[K, D], last hidden states of the nodes that predict something.
        head: the LM's output layer, `head(hidden) -> float[K, V]`.
        source: int64[E], index into the K hidden states; label: int64[E], the next token; weight: float32[E].
        softcap: Gemma 2's cap on the logits.
        label_smoothing: share of the label's probability that is spread evenly over all words, as in
            `torch.nn.functional.cross_entropy`.

    Returns:
        float32 scalar, not averaged.

    Example:
        >>> head = torch.nn.Linear(4, 8).requires_grad_(False).eval()
        >>> torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)  # doctest: +ELLIPSIS
        (...)
        >>> edges = torch.tensor([0, 1]), torch.tensor([3, 5]), torch.ones(2)
        >>> round(next_token_loss(torch.ones(2, 4), head, *edges).item(), 4)  # 2 * log(8)
        4.1589
    """
    frozen = isinstance(head, nn.Linear) and not any(p.requires_grad for p in head.parameters())
    if frozen:
        return _FrozenHeadLoss.apply(hidden, head, source, label, weight, softcap, label_smoothing)
    logits = cap(head(hidden).float(), softcap)
    wanted = (1 - label_smoothing) * logits[source, label] + label_smoothing * logits.mean(dim=-1)[source]
    return (weight * (logits.logsumexp(dim=-1)[source] - wanted)).sum()


class _FrozenHeadLoss(torch.autograd.Function):
    """Sum of weighted cross-entropies through a head that is not trained.

    The gradient of the hidden states is computed in the forward pass, while each tile of logits is at hand; the
    backward pass only scales it. Logits stay in the head's dtype, because a pass over them costs as much as the
    products. Sums are float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: nn.Linear,
        source: Tensor,
        label: Tensor,
        weight: Tensor,
        softcap: float | None,
        smoothing: float,
    ) -> Tensor:
        tiles = head_tiles(head)
        order, spans = _by_tile(source, label, len(hidden), len(tiles))
        source, label, weight = source[order], label[order], weight[order]
        # [K, 1]: each row's softmax counts as often as the row has edges
        row_weight = torch.zeros(len(hidden), 1, device=hidden.device).index_add_(0, source, weight[:, None])
        label_logit, mean_logit = torch.empty_like(weight), torch.zeros(len(hidden), device=hidden.device)
        log_total = torch.empty(len(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for block, start in enumerate(range(0, len(hidden), ROWS)):
            rows = slice(start, start + ROWS)
            softmax = _RunningSoftmax(hidden[rows], softcap, with_gradient=gradient is not None)
            mean = _MeanLogit(hidden[rows], softcap, with_gradient=gradient is not None) if smoothing else None
            for number, (tile, edges) in enumerate(zip(tiles, spans[block], strict=True)):
                # [rows, TILE]
                logits = tile.forward(hidden[rows])
                if softcap is not None:
                    logits = cap(logits.float(), softcap)
                label_logit[edges] = logits[source[edges] - start, label[edges] - number * TILE].float()
                if mean is not None:
                    mean.add(logits, tile)
                softmax.add(logits, tile)
                del logits  # before the next tile's are computed
            log_total[rows] = softmax.log_total()
            if mean is not None:
                mean_logit[rows] = mean.value()
            if gradient is not None:
                edges = slice(spans[block][0].start, spans[block][-1].stop)
                scale = weight[edges] * (1 - smoothing)
                if softcap is not None:
                    scale = scale * _cap_slope(label_logit[edges], softcap)
                label_rows = head.weight[label[edges]].float() * scale[:, None]
                expected_rows = softmax.expected_row() * row_weight[rows]
                if mean is not None:
                    expected_rows -= mean.row() * (smoothing * row_weight[rows])
                gradient[rows] = expected_rows.index_add_(0, source[edges] - start, label_rows, alpha=-1)
        ctx.save_for_backward(gradient)
        wanted = (1 - smoothing) * label_logit + smoothing * mean_logit[source]
        return (weight * (log_total[source] - wanted)).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None, None, None, None


class _RunningSoftmax:
    """Softmax over words that arrive tile by tile, and the mean of the head's rows under it.

    Exponentials are taken relative to the largest logit so far. When a larger one arrives, the sums are scaled down, as
    in FlashAttention (Dao et al. 2022, section 3.1).
    """

    def __init__(self, hidden: Tensor, softcap: float | None, *, with_gradient: bool):
        self._softcap, self._dtype, self._with_gradient = softcap, hidden.dtype, with_gradient
        self._highest = torch.full((len(hidden), 1), -torch.inf, device=hidden.device)
        self._total = torch.zeros_like(self._highest)
        self._row_sum = torch.zeros(hidden.shape if with_gradient else 0, device=hidden.device)

    def add(self, logits: Tensor, tile: PlainWeight | PrepackedWeight) -> None:
        """Add the next tile's logits, capped, float[rows, words]; they are overwritten."""
        slope = None if self._softcap is None else _cap_slope(logits, self._softcap)
        highest = torch.maximum(self._highest, logits.amax(dim=-1, keepdim=True).float())
        scale = (self._highest - highest).exp_()
        shares = logits.sub_(highest.to(logits.dtype)).exp_()
        self._highest = highest
        self._total.mul_(scale).add_(shares.sum(dim=-1, keepdim=True, dtype=torch.float32))
        if self._with_gradient:
            shares = shares if slope is None else shares.mul_(slope).to(self._dtype)
            self._row_sum.mul_(scale).add_(tile.backward(shares))

    def log_total(self) -> Tensor:
        """Log of the sum of all exponentials: float32[rows]."""
        return (self._highest + self._total.log()).squeeze(1)

    def expected_row(self) -> Tensor:
        """Mean of the head's rows under the softmax: float32[rows, D]."""
        return self._row_sum / self._total


class _MeanLogit:
    """Mean of a row's logits over all words, and of the head's rows (times the cap's slope): its gradient."""

    def __init__(self, hidden: Tensor, softcap: float | None, *, with_gradient: bool):
        self._softcap, self._with_gradient, self._words = softcap, with_gradient, 0
        self._sum = torch.zeros(len(hidden), device=hidden.device)
        self._row_sum = torch.zeros(hidden.shape if with_gradient else 0, device=hidden.device)

    def add(self, logits: Tensor, tile: PlainWeight | PrepackedWeight) -> None:
        """Add the next tile's logits, capped, float[rows, words]."""
        self._words += logits.shape[1]
        self._sum += logits.sum(dim=-1, dtype=torch.float32)
        if self._with_gradient and self._softcap is not None:
            self._row_sum += tile.backward(_cap_slope(logits, self._softcap))
        elif self._with_gradient:  # the same for every row
            self._row_sum += tile.backward(torch.ones_like(logits[:1]))

    def value(self) -> Tensor:
        """float32[rows]"""
        return self._sum / self._words

    def row(self) -> Tensor:
        """float32[rows, D]"""
        return self._row_sum / self._words


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    """Gemma 2's cap on logits, `softcap * tanh(logits / softcap)`; without one the logits themselves.

    Example:
        >>> round(float(cap(torch.tensor(100.0), 30.0)), 2)
        29.92
    """
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _cap_slope(capped: Tensor, softcap: float) -> Tensor:
    """Derivative of `cap`, as a function of its result."""
    return 1.0 - (capped / softcap).square()


def _by_tile(source: Tensor, label: Tensor, rows: int, tiles: int) -> tuple[Tensor, list[list[slice]]]:
    """Sort edges by block of rows, then by tile of words; return the order, and the span of each block and tile."""
    key = source.div(ROWS, rounding_mode="floor") * tiles + label.div(TILE, rounding_mode="floor")
    key, order = key.sort(stable=True)
    blocks = -(-rows // ROWS)
    ends = torch.searchsorted(key, torch.arange(1, blocks * tiles + 1, device=key.device)).tolist()
    spans = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return order, [spans[block * tiles : (block + 1) * tiles] for block in range(blocks)]
