"""Which trainer runs each kind of recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from frozenprefix.registry import Registry

TRAINERS: Registry[Callable[..., Any]] = Registry(
    "kind of recipe",
    {
        "prefix": "frozenprefix.training.trainer:train",
        "contrastive": "frozenprefix.training.contrastive:train_contrastive",
    },
)


def train_recipe(recipe: Any, *, resume: str = "auto", callbacks: Sequence[Any] = ()) -> Any:
    """Train a recipe of any kind.

    Args:
        resume: "auto" continues from the run's last state, "never" starts a new run, and a path continues from there.
        callbacks: of transformers' kind, which may end the run; see `Callbacks`.

    Returns:
        The trainer's `TrainingResult`.

    Example:
        >>> train_recipe(recipe, resume="never").best_by
        'loss'
    """
    return TRAINERS.get(recipe.kind)(recipe, resume=resume, callbacks=callbacks)
