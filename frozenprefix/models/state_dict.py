"""Comparing and copying the tensors of a checkpoint and of a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from frozenprefix.errors import CheckpointError


def check_fit(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], source: str) -> None:
    """Compare keys, shapes and dtypes of a model's tensors and a checkpoint's, whose values have to be finite.

    Raises:
        CheckpointError: naming every key that is missing, unexpected, of another shape or no floating-point dtype, or
            has values that are not finite.

    Example:
        >>> check_fit({"weight": torch.zeros(2)}, {"bias": torch.zeros(2)}, "checkpoint")
        Traceback (most recent call last):
        frozenprefix.errors.CheckpointError: checkpoint does not fit this model: missing weight; unexpected bias
    """
    problems = misfits(own, saved)
    problems += [
        f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}, expected a floating-point one"
        if not tensor.is_floating_point()
        else f"{name} has values that are not finite"
        for name, tensor in saved.items()
        if name in own and not (tensor.is_floating_point() and tensor.isfinite().all())
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit this model: " + "; ".join(sorted(problems)))


def misfits(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> list[str]:
    """One phrase for every saved tensor that is missing, unexpected or of another shape, sorted.

    Example:
        >>> misfits({"weight": torch.zeros(2)}, {"weight": torch.zeros(3)})
        ['weight has shape (3,), expected (2,)']
    """
    problems = [f"missing {name}" for name in own.keys() - saved.keys()]
    problems += [f"unexpected {name}" for name in saved.keys() - own.keys()]
    problems += [
        f"{name} has shape {tuple(saved[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own.keys() & saved.keys()
        if saved[name].shape != own[name].shape
    ]
    return sorted(problems)


@torch.no_grad()
def copy_into(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], source: str) -> None:
    """Copy a checkpoint's tensors into a model's after `check_fit`.

    Example:
        >>> own = {"weight": torch.zeros(2)}
        >>> copy_into(own, {"weight": torch.ones(2)}, "checkpoint")
        >>> own["weight"].tolist()
        [1.0, 1.0]
    """
    check_fit(own, saved, source)
    for name, tensor in own.items():
        tensor.copy_(saved[name])
