"""Tensors of a checkpoint against those of a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from frozenprefix.errors import CheckpointError


def check_fit(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Compare key sets and shapes of a model's tensors and a checkpoint's.

    Raises:
        CheckpointError: with every key that is missing, unexpected, or of another shape.
    """
    problems = [f"missing {name}" for name in own.keys() - given.keys()]
    problems += [f"unexpected {name}" for name in given.keys() - own.keys()]
    problems += [
        f"{name} has shape {tuple(given[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own.keys() & given.keys()
        if given[name].shape != own[name].shape
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit this model: " + "; ".join(sorted(problems)))


@torch.no_grad()
def copy_into(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Copy a checkpoint's tensors into a model's, which they have to fit; see `check_fit`."""
    check_fit(own, given, source)
    for name, tensor in own.items():
        tensor.copy_(given[name])
