"""Frozen parts: no gradient, always in evaluation mode, not one bit of a parameter or buffer changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module) -> Module:
    """Switch off gradients and set evaluation mode, so that dropout is off and batch-norm statistics do not move.

    Example:
        >>> freeze(nn.Linear(2, 2)).weight.requires_grad
        False
    """
    module.requires_grad_(False)
    return module.eval()


@contextmanager
def evaluating(model: Module) -> Iterator[Module]:
    """Evaluation mode and no gradients inside the block; afterwards every submodule has the mode it had before.

    Example:
        >>> model = nn.Dropout()
        >>> with evaluating(model):
        ...     print(model.training, torch.is_grad_enabled())
        False False
        >>> model.training
        True
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and values of tensors.

    Example:
        >>> hash_tensors({"weight": torch.zeros(2)})[:8]
        '0b15b00b'
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of trained and of frozen parameters."""

    trainable: int
    frozen: int

    def __str__(self) -> str:
        share = self.trainable / max(1, self.trainable + self.frozen)
        return f"trainable parameters: {self.trainable:,} ({share:.2%}), frozen: {self.frozen:,}"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of a model.

    Example:
        >>> print(count_parameters(nn.Linear(3, 4)))
        trainable parameters: 16 (100.00%), frozen: 0
    """
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return ParameterCount(sum(n for n, trained in sizes if trained), sum(n for n, trained in sizes if not trained))
