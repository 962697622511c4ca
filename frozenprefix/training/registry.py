"""Which trainer runs each kind of recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from frozenprefix.registry import Registry

TRAINERS: Registry[Callable[..., Any]] = Registry(
    "kind of recipe",
    {
        "prefix": "frozenprefix.training.trainer:train",
        "contrastive": "frozenprefix.training.contrastive:train_contrastive",
    },
)


def train_recipe(recipe: Any, *, resume: str = "auto") -> Any:
    """Train a recipe of any kind.

    Args:
        resume: "auto" continues from the run's last state, "never" starts anew; or the folder of a state to continue.

    Returns:
        The trainer's `TrainingResult`.
    """
    return TRAINERS.get(recipe.kind)(recipe, resume=resume)
