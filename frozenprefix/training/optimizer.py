"""Optimizers: torch's fused AdamW or one of timm's, with a learning rate for each part of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from frozenprefix.errors import ConfigError

TIMM_NAMES = {"muon": "muon", "lion": "lion", "adafactor": "adafactorbv"}  # a recipe's name -> timm's


def build_optimizer(
    name: str,
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    part_rates: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer of the trained parameters.

    Matrices are decayed; norms, biases and single numbers are not. Each group of parameters keeps its peak learning
    rate as `peak`.

    Args:
        name: "adamw", "muon" (Jordan et al. 2024; what is not a matrix is trained by AdamW), "lion" (Chen et al. 2023)
            or "adafactor" (Shazeer & Stern 2018, as changed by Zhai et al. 2022). All but AdamW are timm's.
        parameters: named parameters; those without `requires_grad` are left out.
        part_rates: peak learning rates of parameters by the start of their names, up to a dot.

    Raises:
        ConfigError: for a part without trained parameters.

    Example:
        >>> settings = {"learning_rate": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.999)}
        >>> optimizer = build_optimizer("adamw", torch.nn.Linear(2, 2).named_parameters(), **settings)
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.1, 0.0]
    """
    rates = dict(part_rates or {})
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    used: set[str] = set()
    for full_name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        part = full_name.partition(".")[0]
        used.add(part)
        peak, is_matrix = rates.get(part, learning_rate), parameter.ndim > 1
        group = {"params": [], "lr": peak, "peak": peak, "weight_decay": weight_decay if is_matrix else 0.0}
        groups.setdefault((peak, is_matrix), group)["params"].append(parameter)
    unused = sorted(rates.keys() - used)
    if unused:
        trained = ", ".join(sorted(used))
        raise ConfigError(
            f"training.learning_rates: nothing is trained in {unused[0]}; remove it, or name one of: {trained}"
        )
    listed = list(groups.values())
    if name == "adamw":
        # fused: one pass over the weights in place of ten
        return torch.optim.AdamW(listed, lr=learning_rate, betas=betas, fused=True)
    # float32: a resumed optimizer would turn a momentum in bfloat16 into float32, and go on differently
    options: dict[str, Any] = {"momentum_dtype": torch.float32} if name == "adafactor" else {"betas": betas}
    return create_optimizer_v2(listed, TIMM_NAMES[name], lr=learning_rate, weight_decay=weight_decay, **options)
