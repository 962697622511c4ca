"""What recipes of every kind share: checked as a whole, written, and compared with the recipe of an earlier run."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from frozenprefix.config.errors import collect_problems, lines_of
from frozenprefix.config.sections import DataSection, ImageModelSection, RecipeSection, RunSection, TrackingSection
from frozenprefix.config.yaml import apply_overrides, write_yaml
from frozenprefix.errors import ConfigError, Problem
from frozenprefix.models.configuration import DType

# They set how fast the learning rate falls, so a constant one does not depend on them.
_LENGTH = ("max_steps", "epochs", "max_minutes")
# What a resumed run of any kind has to share with the run that it continues.
SAME_TRAINING = (
    "images_per_step",
    "targets_per_image",
    "learning_rate",
    "weight_decay",
    "betas",
    "warmup_steps",
    "schedule",
    "max_grad_norm",
    "precision",
)
DTYPES: dict[str, DType] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


AnyRecipe = TypeVar("AnyRecipe", bound="BaseRecipe")


class BaseRecipe(RecipeSection):
    """One experiment. `load_recipe` and `from_dict` make it, and report all problems at once.

    Attributes:
        same_on_resume: section → keys that a resumed run has to share with the run that it continues; other keys may
            change between the two.
    """

    same_on_resume: ClassVar[dict[str, tuple[str, ...]]] = {}

    name: str = Field(min_length=1)
    output_dir: Path = Field(description="the run's folder")
    seed: int = Field(0, ge=0, lt=2**32)
    model: ImageModelSection
    data: DataSection
    training: RunSection
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _fill_dtype(self) -> Self:
        """Frozen parts take the dtype of the training unless their section names one."""
        for section in (self.model.vision_encoder, getattr(self.model, "language_model", None)):
            if section is not None and "dtype" not in section.model_fields_set:
                section.dtype = DTYPES[self.training.precision]
        return self

    def problems(self) -> list[Problem]:
        patience, key = self.training.early_stopping_patience, "training.early_stopping_patience"
        if self.data.validation or patience is None:
            return []
        return [Problem(f"got {patience!r}, which has no effect without data.validation", (key, "data.validation"))]

    @classmethod
    def from_dict(cls, data: dict[str, Any], overrides: Iterable[str] = ()) -> Self:
        """Check plain data, as they stand in a recipe file.

        Args:
            data: the blocks of a recipe; `output_dir` is `runs/NAME` when missing.
            overrides: `training.learning_rate=1e-4`, `data.train.0.path=/x`; values are YAML.

        Raises:
            ConfigError: with one line for every wrong key or value in data and overrides.

        Example:
            >>> from frozenprefix.config import Recipe
            >>> Recipe.from_dict(recipe.model_dump(mode="json"), ["seed=3"]).seed
            3
        """
        data = copy.deepcopy(data)
        lines = apply_overrides(data, overrides)
        data.setdefault("output_dir", f"runs/{data.get('name')}")
        recipe, problems = _validate(cls, data)
        lines += lines_of(problems)
        if lines or recipe is None:
            raise ConfigError(lines)
        return recipe

    def to_yaml(self) -> str:
        """The recipe with every default filled in, as a file that `load_recipe` reads.

        Example:
            >>> recipe.to_yaml().splitlines()[0]
            'name: tiny'
        """
        return write_yaml(self.model_dump(mode="json"))

    def follows_length(self) -> bool:
        """Whether a step depends on how long the run will be."""
        return self.training.schedule != "constant"

    def fingerprint(self) -> dict[str, Any]:
        """What has to be equal for a run to be resumed: dotted key → JSON value.

        Names, outputs, logging, validation, evaluation and tracking may change in between. So may the length of the
        run if no step depends on it.

        Example:
            >>> recipe.fingerprint()["seed"]
            0
        """
        data = self.model_dump(mode="json")
        keys = {section: list(names) for section, names in self.same_on_resume.items()}
        if self.follows_length():
            keys["training"] += _LENGTH
        return {
            f"{section}.{name}".lstrip("."): (data[section] if section else data)[name]
            for section, names in keys.items()
            for name in names
        }


def _validate(kind: type[AnyRecipe], data: dict[str, Any]) -> tuple[AnyRecipe | None, list[Problem]]:
    """Check, and on errors check again without the wrong values: they hide values that do not go together."""
    recipe, problems = _validate_once(kind, data)
    if recipe is not None:
        return recipe, []
    rest = copy.deepcopy(data)
    wrong = [key for problem in problems for key in problem.keys]
    for key in wrong:
        _remove(rest, key)
    _, more = _validate_once(kind, rest)
    return None, problems + [problem for problem in more if not any(_touches(problem, key) for key in wrong)]


def _validate_once(kind: type[AnyRecipe], data: dict[str, Any]) -> tuple[AnyRecipe | None, list[Problem]]:
    try:
        # As JSON, because pydantic's strict mode then still takes a list for a tuple and a string for a path.
        return kind.model_validate_json(json.dumps(data, default=str), strict=True), []
    except ValidationError as error:
        return None, collect_problems(error.errors(), data, kind)


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
