"""Moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class WeightAverage:
    """Exponential moving average (EMA) of tensors, for validation and the best checkpoint.

    The first updates follow the weights more closely: the decay of update k is at most (1 + k) / (10 + k).

    Args:
        tensors: the trained tensors by name; they are changed in place by the optimizer.
        decay: share of the average that an update keeps, 0 to below 1.

    Example:
        >>> weights = {"weight": torch.zeros(2)}
        >>> average = WeightAverage(weights, decay=0.5)
        >>> weights["weight"] += 1
        >>> average.update()
        >>> with average.applied():
        ...     print(weights["weight"].round(decimals=2))  # 2 / 11 of the old weights
        tensor([0.8200, 0.8200])
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float):
        self.decay, self.updates = decay, 0
        self._weights = {name: tensor.detach() for name, tensor in tensors.items()}
        self.state = {name: tensor.clone() for name, tensor in self._weights.items()}

    def update(self) -> None:
        """Move the average towards the present weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, tensor in self._weights.items():
            self.state[name].lerp_(tensor, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the place of the weights, which come back at the end."""
        kept = {name: tensor.clone() for name, tensor in self._weights.items()}
        try:
            self._copy(self.state)
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, tensor in self._weights.items():
            tensor.copy_(values[name])
