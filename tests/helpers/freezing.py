"""The tensors of a model that training must not change."""

from __future__ import annotations

from torch import Tensor, nn


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters without a gradient, and all buffers of modules without a trained parameter."""
    tensors: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    for prefix, module in model.named_modules():
        if not any(p.requires_grad for p in module.parameters()):
            tensors |= {f"{prefix}.{name}": b for name, b in module.named_buffers(recurse=False)}
    return tensors
