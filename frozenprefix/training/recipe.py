"""The recipe: one YAML per experiment, checked as a whole before anything is loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from frozenprefix.errors import ConfigError, did_you_mean
from frozenprefix.models.configuration import DType
from frozenprefix.training.objective_sections import ObjectivesSection
from frozenprefix.training.problems import Problem, collect_problems
from frozenprefix.training.sections import (
    DataSection,
    EvaluationSection,
    ModelSection,
    RecipeSection,
    TrackingSection,
    TrainingSection,
    raise_clash,
)
from frozenprefix.training.yaml_text import apply_overrides, read_yaml, write_yaml

# What a resumed run has to share with the run that it goes on with. The rest may change between the two.
_SAME_ON_RESUME = {
    "": ("seed", "model", "objectives"),
    "data": ("train", "prompts", "text_only", "retrieval"),
    "training": (
        "pictures_per_step",
        "targets_per_picture",
        "gradient_accumulation_steps",
        "learning_rate",
        "weight_decay",
        "betas",
        "warmup_steps",
        "schedule",
        "max_grad_norm",
        "precision",
        "packing",
        "tokens_per_row",
        "max_target_tokens",
    ),
}
# They set how fast the learning rate falls, so a constant one does not depend on them.
_LENGTH = ("max_steps", "epochs", "max_minutes")

_DTYPES: dict[str, DType] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Recipe(RecipeSection):
    """One experiment. Make it with `Recipe.load` or `Recipe.from_dict`, which report all problems at once."""

    name: str = Field(min_length=1)
    output_dir: Path = Field(description="the run's folder")
    seed: int = Field(0, ge=0, lt=2**32)
    model: ModelSection
    data: DataSection
    training: TrainingSection
    objectives: ObjectivesSection = ObjectivesSection()
    evaluation: EvaluationSection = EvaluationSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _fill_dtype(self) -> Recipe:
        """Frozen parts take the dtype of the training unless their section names one."""
        for section in (self.model.vision_encoder, self.model.language_model):
            if "dtype" not in section.model_fields_set:
                section.dtype = _DTYPES[self.training.precision]
        return self

    @model_validator(mode="after")
    def _check_cache_is_off(self) -> Recipe:
        for name, none in (("trainable", "none"), ("peft", None)):
            value = getattr(self.model.vision_encoder, name)
            if value != none and self.data.feature_cache != "off":
                keys = ("data.feature_cache", f"model.vision_encoder.{name}")
                given = f" {value!r}" if name == "trainable" else ""
                got = f"got '{self.data.feature_cache}', expected 'off' with {keys[1]}{given}"
                raise_clash([Problem(keys, f"{keys[0]}: {got}: the features change with every step")])
        return self

    @model_validator(mode="after")
    def _check_adalora(self) -> Recipe:
        """AdaLoRA's ranks follow the number of steps; a clock that ends the run would leave them half-way."""
        if self.training.max_minutes is not None and self._has_adalora():
            key = "training.max_minutes"
            line = (
                f"{key}: got {self.training.max_minutes:g}, expected null with peft method 'adalora', whose ranks "
                "follow the number of steps; give epochs or max_steps alone"
            )
            raise_clash([Problem((key, "model"), line)])
        return self

    def _has_adalora(self) -> bool:
        methods = (self.model.language_model.peft, self.model.vision_encoder.peft)
        return any(method is not None and method.type == "adalora" for method in methods)

    @model_validator(mode="after")
    def _check_validation_is_there(self) -> Recipe:
        patience = self.training.early_stopping_patience
        if not self.data.validation and patience is not None:
            key = "training.early_stopping_patience"
            line = f"{key}: got {patience!r}, which has no effect without data.validation"
            raise_clash([Problem((key, "data.validation"), line)])
        return self

    @model_validator(mode="after")
    def _check_text_only(self) -> Recipe:
        if self.data.text_only is None:
            return self
        key, encoder = "data.text_only", self.model.vision_encoder
        problems = []
        if encoder.source != "open_clip" or encoder.output != "pooled":
            keys = (key, "model.vision_encoder")
            line = (
                f"{key}: needs an encoder that shares its space with texts, of source 'open_clip', output 'pooled'; "
                f"got '{encoder.name}' of source '{encoder.source}' with output '{encoder.output}'"
            )
            problems.append(Problem(keys, line))
        for name in ("contrastive", "self_critical"):
            if getattr(self.objectives, name) is not None:
                line = f"objectives.{name}: needs pictures to train on, which data.text_only leaves out; remove one"
                problems.append(Problem((f"objectives.{name}", key), line))
        raise_clash(problems)
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
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
    def from_dict(cls, data: dict[str, Any], overrides: Iterable[str] = ()) -> Recipe:
        """Check plain data as it stands in a recipe file; see `load`. `output_dir` defaults to `runs/NAME`."""
        data = copy.deepcopy(data)
        problems = apply_overrides(data, overrides)
        data.setdefault("output_dir", f"runs/{data.get('name')}")
        recipe, found = _validate(data)
        problems += [problem.line for problem in found]
        if problems or recipe is None:
            raise ConfigError(problems)
        return recipe

    def to_yaml(self) -> str:
        """The recipe with every default filled in. `Recipe.load` reads the same recipe back."""
        return write_yaml(self.model_dump(mode="json"))

    def fingerprint(self) -> dict[str, Any]:
        """What has to be equal for a run to be resumed: dotted key → JSON value.

        Names, paths of outputs, logging, validation, evaluation and tracking may change in between. So may the length
        of the run when the learning rate is constant, and no rank follows it.
        """
        data = self.model_dump(mode="json")
        keys = {section: list(names) for section, names in _SAME_ON_RESUME.items()}
        if self.training.schedule != "constant" or self._has_adalora():
            keys["training"] += _LENGTH
        return {
            f"{section}.{name}".lstrip("."): (data[section] if section else data)[name]
            for section, names in keys.items()
            for name in names
        }


def _validate(data: dict[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """Check twice: a section with a wrong value is checked again without it, for values that do not go together."""
    recipe, problems = _validate_once(data)
    if recipe is not None:
        return recipe, []
    rest = copy.deepcopy(data)
    wrong = [key for problem in problems for key in problem.keys]
    for key in wrong:
        _remove(rest, key)
    _, more = _validate_once(rest)
    return None, problems + [problem for problem in more if not any(_touches(problem, key) for key in wrong)]


def _validate_once(data: dict[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    try:
        # As JSON, because pydantic's strict mode then still takes a list for a tuple and a string for a path.
        return Recipe.model_validate_json(json.dumps(data, default=str), strict=True), []
    except ValidationError as error:
        return None, collect_problems(error.errors(), data, Recipe)


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
