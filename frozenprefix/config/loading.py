"""From a recipe file, its bases and overrides to a recipe of the right kind."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from frozenprefix.config.base_recipe import BaseRecipe
from frozenprefix.config.contrastive import ContrastiveRecipe
from frozenprefix.config.errors import collect_problems, lines_of
from frozenprefix.config.recipe import Recipe
from frozenprefix.config.yaml import apply_overrides, read_yaml
from frozenprefix.errors import ConfigError, Problem, did_you_mean
from frozenprefix.utils import read_text

R = TypeVar("R", bound=BaseRecipe)
SCHEMAS: dict[str, type[Recipe] | type[ContrastiveRecipe]] = {"prefix": Recipe, "contrastive": ContrastiveRecipe}
_OWN_KEYS = ("name", "output_dir")  # never taken from a base, or two recipes would write into one folder


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe | ContrastiveRecipe:
    """Read a recipe file of any kind.

    A recipe with `base: other.yaml` (relative to the recipe) is merged into that file: blocks key by key, while lists
    and plain values replace those of the base. Name and output folder are the recipe's own; without them they are the
    file's name and `runs/NAME`. A recipe without `kind` is of kind "prefix".

    Args:
        overrides: `training.learning_rate=1e-4`, `data.train.0.path=/x`; values are YAML.

    Raises:
        ConfigError: for files that are missing, not YAML, or bases of each other, for an unknown kind, and with one
            line for every wrong key or value in the merged recipe and the overrides.

    Example:
        >>> load_recipe(recipe_path, ["training.learning_rate=1e-4"]).training.learning_rate
        0.0001
    """
    path = Path(path)
    return recipe_from_dict({"name": path.stem, **_read_merged(path, ())}, overrides)


def recipe_from_dict(data: dict[str, Any], overrides: Iterable[str] = ()) -> Recipe | ContrastiveRecipe:
    """Check plain data with the blocks of a recipe file.

    Args:
        data: the blocks of a recipe; `output_dir` is `runs/NAME` when missing.
        overrides: as for `load_recipe`.

    Raises:
        ConfigError: for an unknown kind, and with one line for every wrong key or value.

    Example:
        >>> recipe_from_dict(recipe.model_dump(mode="json"), ["seed=3"]).seed
        3
    """
    data = copy.deepcopy(data)
    lines = apply_overrides(data, overrides)
    data.setdefault("output_dir", f"runs/{data.get('name')}")
    kind = data.get("kind", "prefix")
    if kind not in SCHEMAS:
        raise ConfigError(f"kind: got {kind!r}, expected one of: {', '.join(SCHEMAS)}{did_you_mean(kind, SCHEMAS)}")
    recipe, problems = _validate(SCHEMAS[kind], data)
    lines += lines_of(problems)
    if lines or recipe is None:
        raise ConfigError(lines)
    return recipe


def load_checkpoint_recipe(checkpoint: str | Path) -> Recipe | ContrastiveRecipe | None:
    """The recipe that a checkpoint folder was trained with, or None if it holds no recipe.yaml.

    Raises:
        ConfigError: for a recipe that cannot be read.

    Example:
        >>> load_checkpoint_recipe(tmp_path) is None
        True
    """
    file = Path(checkpoint) / "recipe.yaml"
    if not file.is_file():
        return None
    try:
        return load_recipe(file)
    except ConfigError as error:
        lines = (line if line.startswith(str(file)) else f"{file}: {line}" for line in error.problems)
        raise ConfigError(lines) from error


def _read_merged(path: Path, users: tuple[Path, ...]) -> dict[str, Any]:
    """A recipe file merged into its base. `users`: the files that led here, each by its `base`."""
    if not path.is_file():
        field = f"{users[-1]}: base" if users else "recipe"
        near = did_you_mean(path.name, [other.name for other in path.parent.glob("*.yaml")])
        raise ConfigError(f"{field}: got '{path}', expected a YAML file that exists{near}")
    if path.resolve() in [user.resolve() for user in users]:
        raise ConfigError(f"{users[-1]}: base: goes round in a circle: {' → '.join(map(str, (*users, path)))}")
    data = read_yaml(read_text(path), str(path))
    if not isinstance(data, dict):
        keys = ", ".join(Recipe.model_fields)
        raise ConfigError(f"{path}: got {type(data).__name__}, expected a block of keys ({keys})")
    if "base" not in data:
        return data
    base = data.pop("base")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: got {base!r}, expected the path of a recipe, relative to this one")
    below = _read_merged(path.parent / base, (*users, path))
    return _merge({key: value for key, value in below.items() if key not in _OWN_KEYS}, data)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    if "source" in changes and "source" in base and changes["source"] != base["source"]:
        return changes  # an encoder of another source has other keys
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _validate(schema: type[R], data: dict[str, Any]) -> tuple[R | None, list[Problem]]:
    """Check; on errors check again without the wrong values, which hide conflicts between other values."""
    recipe, problems = _validate_once(schema, data)
    if recipe is not None:
        return recipe, []
    rest = copy.deepcopy(data)
    wrong = [key for problem in problems for key in problem.keys]
    for key in wrong:
        _remove(rest, key)
    _, more = _validate_once(schema, rest)
    return None, problems + [problem for problem in more if not any(_touches(problem, key) for key in wrong)]


def _validate_once(schema: type[R], data: dict[str, Any]) -> tuple[R | None, list[Problem]]:
    try:
        # As JSON, because pydantic's strict mode then still takes a list for a tuple and a string for a path.
        return schema.model_validate_json(json.dumps(data, default=str), strict=True), []
    except ValidationError as error:
        return None, collect_problems(error.errors(), data, schema)


def _touches(problem: Problem, key: str) -> bool:
    return any(f"{mine}.".startswith(f"{key}.") or f"{key}.".startswith(f"{mine}.") for mine in problem.keys)


def _remove(data: Any, dotted: str) -> None:
    """Remove a key. A key inside a list takes the whole list with it."""
    *parents, last = dotted.split(".")
    for part in parents:
        inner = data.get(part) if isinstance(data, dict) else None
        if not isinstance(inner, dict):
            last = part
            break
        data = inner
    if isinstance(data, dict):
        data.pop(last, None)
