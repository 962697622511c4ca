"""The frozen contract: no gradient, evaluation mode for good, not one bit changed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module) -> Module:
    """Take `module` out of training: no parameter needs a gradient, dropout and batch-norm statistics stand still."""
    module.requires_grad_(False)
    return module.eval()


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of parameters and buffers."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters that are not trained, and all buffers of modules that hold no trained parameter."""
    tensors: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    for prefix, module in model.named_modules():
        if not any(p.requires_grad for p in module.parameters()):
            tensors |= {f"{prefix}.{name}": b for name, b in module.named_buffers(recurse=False)}
    return tensors


@dataclass(frozen=True)
class ParameterCount:
    trainable: int
    frozen: int

    def __str__(self) -> str:
        share = self.trainable / max(1, self.trainable + self.frozen)
        return f"trainable parameters: {self.trainable:,} ({share:.2%}), frozen: {self.frozen:,}"


def count_parameters(model: nn.Module) -> ParameterCount:
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return ParameterCount(sum(n for n, trained in sizes if trained), sum(n for n, trained in sizes if not trained))
