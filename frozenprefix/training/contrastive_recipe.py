"""The recipe of locked-image tuning: `kind: contrastive`."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from frozenprefix.errors import ConfigError
from frozenprefix.models.configuration import DType, VisionEncoderConfig
from frozenprefix.models.contrastive.configuration import Objective, ProjectionConfig, TextTowerConfig
from frozenprefix.models.processing import DEFAULT_PROMPTS
from frozenprefix.training.problems import Problem, collect_problems
from frozenprefix.training.sections import DataSection, RecipeSection, TrackingSection, raise_clash
from frozenprefix.training.yaml_text import apply_overrides, read_yaml, write_yaml

# What a resumed run has to share with the run that it goes on with.
_SAME_ON_RESUME = {
    "": ("seed", "model"),
    "data": ("train",),
    "training": (
        "pictures_per_step",
        "targets_per_picture",
        "learning_rate",
        "tower_learning_rate",
        "weight_decay",
        "betas",
        "warmup_steps",
        "schedule",
        "max_grad_norm",
        "precision",
        "texts_per_chunk",
    ),
}
_LENGTH = ("max_steps", "epochs", "max_minutes")
_DTYPES: dict[str, DType] = {"fp32": "float32", "bf16": "bfloat16"}


class ContrastiveModelSection(RecipeSection):
    """What the model is made of; the sections are those of the model's own config."""

    vision_encoder: VisionEncoderConfig
    text_tower: TextTowerConfig
    image_projection: ProjectionConfig = Field(default_factory=ProjectionConfig)
    text_projection: ProjectionConfig = Field(default_factory=ProjectionConfig)
    projection_dim: int = Field(256, ge=1, description="size of the space that both towers are projected into")
    objective: Objective = "infonce"


class ContrastiveTrainingSection(RecipeSection):
    """How the text tower and the projections are trained. One of `epochs` and `max_steps` has to be given."""

    max_steps: int | None = Field(None, ge=1, description="optimizer steps")
    epochs: int | None = Field(None, ge=1, description="times that every picture is seen")
    max_minutes: float | None = Field(None, gt=0, description="wall clock; the schedule then follows the time")
    pictures_per_step: int = Field(128, ge=2, description="pictures that are compared with each other")
    targets_per_picture: int | None = Field(1, ge=1, description="texts drawn per picture; null for all")
    learning_rate: float = Field(1e-3, gt=0, description="of the projections and the logit scale")
    tower_learning_rate: float = Field(1e-4, gt=0, description="of the text tower")
    weight_decay: float = Field(0.01, ge=0, description="of matrices; not of biases, norms and the logit scale")
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = Field(50, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: float | None = Field(1.0, gt=0, description="null for no clipping")
    precision: Literal["fp32", "bf16"] = "fp32"
    texts_per_chunk: int = Field(64, ge=1, description="texts of like length that go through the tower together")
    gradient_cache: bool = Field(False, description="keep the activations of one chunk at a time; costs a forward pass")
    log_every: int = Field(10, ge=1, description="steps")
    validate_every: int = Field(200, ge=1, description="steps")
    validation_pictures: int | None = Field(256, ge=2, description="pictures per validation; null for all")
    save_every: int = Field(200, ge=1, description="steps")
    early_stopping_patience: int | None = Field(None, ge=1, description="validations without a higher recall")

    @model_validator(mode="after")
    def _check_together(self) -> ContrastiveTrainingSection:
        problems = []
        if (self.epochs is None) == (self.max_steps is None):
            got = "got none" if self.epochs is None else f"got {self.epochs} beside max_steps {self.max_steps}"
            line = f"training.epochs: {got}, expected one of epochs and max_steps"
            problems.append(Problem(("training.epochs", "training.max_steps"), line))
        if self.max_steps is not None and 0 < self.max_steps <= self.warmup_steps:
            key = "training.warmup_steps"
            line = f"{key}: got {self.warmup_steps}, expected fewer than max_steps {self.max_steps}"
            problems.append(Problem((key, "training.max_steps"), line))
        if not all(0 <= beta < 1 for beta in self.betas):
            key = "training.betas"
            line = f"{key}: got {list(self.betas)}, expected two numbers from 0 to below 1"
            problems.append(Problem((key,), line))
        raise_clash(problems)
        return self


class ContrastiveRecipe(RecipeSection):
    """One experiment of locked-image tuning. Make it with `load` or `from_dict`, which report all problems at once."""

    kind: Literal["contrastive"]
    name: str = Field(min_length=1)
    output_dir: Path = Field(description="the run's folder")
    seed: int = Field(0, ge=0, lt=2**32)
    model: ContrastiveModelSection
    data: DataSection
    training: ContrastiveTrainingSection
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _fill_dtype(self) -> ContrastiveRecipe:
        """The locked encoder takes the dtype of the training unless its section names one."""
        if "dtype" not in self.model.vision_encoder.model_fields_set:
            self.model.vision_encoder.dtype = _DTYPES[self.training.precision]
        return self

    @model_validator(mode="after")
    def _check_what_has_no_effect(self) -> ContrastiveRecipe:
        problems = []
        for name in {"prompts", "text_only", "retrieval"} & self.data.model_fields_set:
            if getattr(self.data, name) not in (None, DEFAULT_PROMPTS):  # as `to_yaml` writes them
                key = f"data.{name}"
                problems.append(Problem((key,), f"{key}: has no effect in a contrastive recipe; remove it"))
        if self.model.vision_encoder.trainable != "none":
            key = "model.vision_encoder.trainable"
            line = f"{key}: got {self.model.vision_encoder.trainable!r}, expected 'none': the image encoder is locked"
            problems.append(Problem((key,), line))
        raise_clash(problems)
        return self

    @model_validator(mode="after")
    def _check_validation_is_there(self) -> ContrastiveRecipe:
        patience = self.training.early_stopping_patience
        if not self.data.validation and patience is not None:
            key = "training.early_stopping_patience"
            line = f"{key}: got {patience!r}, which has no effect without data.validation"
            raise_clash([Problem((key, "data.validation"), line)])
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> ContrastiveRecipe:
        """Read a recipe file; overrides as in `Recipe.load`.

        Raises:
            ConfigError: with one line per problem.
        """
        path = Path(path)
        data = read_yaml(path.read_text(encoding="utf-8"), str(path))
        return cls.from_dict({"name": path.stem, **data}, overrides)

    @classmethod
    def from_dict(cls, data: dict[str, Any], overrides: Iterable[str] = ()) -> ContrastiveRecipe:
        """Check plain data as it stands in a recipe file. `output_dir` defaults to `runs/NAME`."""
        data = copy.deepcopy(data)
        problems = apply_overrides(data, overrides)
        data.setdefault("output_dir", f"runs/{data.get('name')}")
        try:
            # as JSON: pydantic's strict mode then still takes a list for a tuple and a string for a path
            recipe = cls.model_validate_json(json.dumps(data, default=str), strict=True)
        except ValidationError as error:
            found = collect_problems(error.errors(), data, cls)
            raise ConfigError(problems + [problem.line for problem in found]) from error
        if problems:
            raise ConfigError(problems)
        return recipe

    def to_yaml(self) -> str:
        """The recipe with every default filled in. `load` reads the same recipe back."""
        return write_yaml(self.model_dump(mode="json"))

    def fingerprint(self) -> dict[str, Any]:
        """What has to be equal for a run to be resumed: dotted key -> JSON value."""
        data = self.model_dump(mode="json")
        keys = {section: list(names) for section, names in _SAME_ON_RESUME.items()}
        if self.training.schedule != "constant":
            keys["training"] += _LENGTH
        return {
            f"{section}.{name}".lstrip("."): (data[section] if section else data)[name]
            for section, names in keys.items()
            for name in names
        }
