"""What recipes of every kind share: how one is read, checked as a whole, written, and compared with an earlier one."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import Field, ValidationError, model_validator

from frozenprefix.config.errors import Problem, collect_problems
from frozenprefix.config.sections import (
    DataSection,
    ImageModelSection,
    RecipeSection,
    RunSection,
    TrackingSection,
    raise_clash,
)
from frozenprefix.config.yaml import apply_overrides, read_yaml, write_yaml
from frozenprefix.errors import ConfigError, did_you_mean
from frozenprefix.models.configuration import DType

Self = TypeVar("Self", bound="RecipeFile")
# They set how fast the learning rate falls, so a constant one does not depend on them.
_LENGTH = ("max_steps", "epochs", "max_minutes")
# What every kind of run has to share with the run that it goes on with.
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


class RecipeFile(RecipeSection):
    """One experiment. Make it with `load` or `from_dict`, which report all problems at once.

    Attributes:
        same_on_resume: section → what a resumed run has to share with the run that it goes on with; the rest may
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
    def _fill_dtype(self: Self) -> Self:
        """Frozen parts take the dtype of the training unless their section names one."""
        for section in (self.model.vision_encoder, getattr(self.model, "language_model", None)):
            if section is not None and "dtype" not in section.model_fields_set:
                section.dtype = DTYPES[self.training.precision]
        return self

    @model_validator(mode="after")
    def _check_validation_is_there(self: Self) -> Self:
        patience = self.training.early_stopping_patience
        if not self.data.validation and patience is not None:
            key = "training.early_stopping_patience"
            line = f"{key}: got {patience!r}, which has no effect without data.validation"
            raise_clash([Problem((key, "data.validation"), line)])
        return self

    @classmethod
    def load(cls: type[Self], path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Read a recipe file.

        Args:
            overrides: `training.learning_rate=1e-4`, `data.train.0.path=/x`; values are read as YAML.

        Raises:
            ConfigError: with one line per problem, for a file that is missing or not YAML, and for every wrong key
                or value in file and overrides.
        """
        path = Path(path)
        if not path.is_file():
            near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.yaml")])
            raise ConfigError(f"recipe: got '{path}', expected a YAML file that exists{near}")
        data = read_yaml(path.read_text(encoding="utf-8"), str(path))
        if not isinstance(data, dict):
            raise ConfigError(
                f"{path}: got {type(data).__name__}, expected a block of keys ({', '.join(cls.model_fields)})"
            )
        return cls.from_dict({"name": path.stem, **data}, overrides)

    @classmethod
    def from_dict(cls: type[Self], data: dict[str, Any], overrides: Iterable[str] = ()) -> Self:
        """Check plain data as it stands in a recipe file; see `load`. `output_dir` defaults to `runs/NAME`."""
        data = copy.deepcopy(data)
        problems = apply_overrides(data, overrides)
        data.setdefault("output_dir", f"runs/{data.get('name')}")
        recipe, found = _validate(cls, data)
        problems += [problem.line for problem in found]
        if problems or recipe is None:
            raise ConfigError(problems)
        return recipe

    def to_yaml(self) -> str:
        """The recipe with every default filled in. `load` reads the same recipe back."""
        return write_yaml(self.model_dump(mode="json"))

    def follows_length(self) -> bool:
        """Whether a step depends on how long the run will be."""
        return self.training.schedule != "constant"

    def fingerprint(self) -> dict[str, Any]:
        """What has to be equal for a run to be resumed: dotted key → JSON value.

        Names, paths of outputs, logging, validation, evaluation and tracking may change in between. So may the length
        of the run when no step follows it.
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


def _validate(kind: type[Self], data: dict[str, Any]) -> tuple[Self | None, list[Problem]]:
    """Check twice: a section with a wrong value is checked again without it, for values that do not go together."""
    recipe, problems = _validate_once(kind, data)
    if recipe is not None:
        return recipe, []
    rest = copy.deepcopy(data)
    wrong = [key for problem in problems for key in problem.keys]
    for key in wrong:
        _remove(rest, key)
    _, more = _validate_once(kind, rest)
    return None, problems + [problem for problem in more if not any(_touches(problem, key) for key in wrong)]


def _validate_once(kind: type[Self], data: dict[str, Any]) -> tuple[Self | None, list[Problem]]:
    try:
        # As JSON, because pydantic's strict mode then still takes a list for a tuple and a string for a path.
        return kind.model_validate_json(json.dumps(data, default=str), strict=True), []
    except ValidationError as error:
        return None, collect_problems(error.errors(), data, kind)


def _touches(problem: Problem, key: str) -> bool:
    return any(f"{mine}.".startswith(f"{key}.") or f"{key}.".startswith(f"{mine}.") for mine in problem.keys)


def _remove(data: Any, dotted: str) -> None:
    """Remove a key; what stands in a list takes the whole list with it."""
    *parents, last = dotted.split(".")
    for part in parents:
        inner = data.get(part) if isinstance(data, dict) else None
        if not isinstance(inner, dict):
            last = part
            break
        data = inner
    if isinstance(data, dict):
        data.pop(last, None)
