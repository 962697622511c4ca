"""The kinds of recipes, and which trainer runs each."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from frozenprefix.config.recipe import Recipe
from frozenprefix.config.yaml import read_yaml
from frozenprefix.errors import ConfigError, did_you_mean


class Kind(NamedTuple):
    """Where a kind's recipe and trainer are."""

    recipe: str
    train: str


KINDS = {
    "prefix": Kind("frozenprefix.config.recipe:Recipe", "frozenprefix.training.trainer:train"),
    "contrastive": Kind(
        "frozenprefix.config.contrastive:ContrastiveRecipe",
        "frozenprefix.training.contrastive:train_contrastive",
    ),
}


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> tuple[Kind, Any]:
    """Read a recipe of any kind; one that names no `kind` is a prefix recipe.

    Raises:
        ConfigError: for an unknown kind, and as the recipe's own `load` does.
    """
    path = Path(path)
    name: Any = "prefix"
    if path.is_file():
        data = read_yaml(path.read_text(encoding="utf-8"), str(path))
        name = data.get("kind", name) if isinstance(data, dict) else name
    if name not in KINDS:
        raise ConfigError(f"kind: got {name!r}, expected one of: {', '.join(KINDS)}{did_you_mean(str(name), KINDS)}")
    kind = KINDS[name]
    schema: Any = Recipe if name == "prefix" else _attribute(kind.recipe)
    return kind, schema.load(path, overrides)


def train_recipe(kind: Kind, recipe: Any, *, resume: str = "auto") -> Any:
    """Run the trainer of a recipe's kind; returns its `TrainingResult`."""
    return _attribute(kind.train)(recipe, resume=resume)


def _attribute(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(module), name)
