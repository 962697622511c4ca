"""Keys and methods of recipes of all kinds: precision, YAML, and comparison with the recipe of an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_serializer, model_validator
from typing_extensions import Self

from frozenprefix.config.sections import DataSection, ImageModelSection, RecipeSection, RunSection, TrackingSection
from frozenprefix.config.yaml import write_yaml
from frozenprefix.errors import Problem
from frozenprefix.models.section import DType

# They determine how fast the learning rate falls; a constant learning rate does not depend on them.
_LENGTH = ("max_steps", "epochs", "max_minutes")
# Keys whose values a resumed run has to share with the run that it continues.
SAME_TRAINING = (
    "images_per_step",
    "targets_per_image",
    "optimizer",
    "learning_rate",
    "weight_decay",
    "betas",
    "warmup_steps",
    "schedule",
    "max_grad_norm",
    "ema",
    "precision",
)
DTYPES: dict[str, DType] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class BaseRecipe(RecipeSection):
    """One experiment. `load_recipe` and `recipe_from_dict` create it, and report all problems at once.

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
    def _check_dtypes(self) -> Self:
        self._fill_dtypes()
        return self

    def _fill_dtypes(self) -> None:
        """Frozen parts take the dtype of the training unless their section names one."""
        if self.training.precision != "auto":
            for section in self._open_dtypes():
                section.dtype = DTYPES[self.training.precision]

    @model_serializer(mode="wrap")
    def _leave_out_open_dtypes(self, serialize: Any) -> dict:  # other names are looked up where the subclass is
        """With `precision: auto` the dtypes are not decided yet."""
        data = serialize(self)
        for name in ("vision_encoder", "language_model"):
            if getattr(self.model, name, None) in self._open_dtypes():
                data["model"][name].pop("dtype")
        return data

    def _open_dtypes(self) -> list[Any]:
        """Sections of frozen parts that do not name a dtype."""
        parts = (self.model.vision_encoder, getattr(self.model, "language_model", None))
        return [section for section in parts if section is not None and "dtype" not in section.model_fields_set]

    def with_precision(self, precision: str) -> Self:
        """The recipe with another precision, which frozen parts without a dtype of their own follow.

        Example:
            >>> recipe.with_precision("bf16").training.precision
            'bf16'
        """
        training = self.training.model_copy(update={"precision": precision})
        recipe = self.model_copy(update={"training": training}, deep=True)
        recipe._fill_dtypes()
        return recipe

    def problems(self) -> list[Problem]:
        patience, key = self.training.early_stopping_patience, "training.early_stopping_patience"
        if self.data.validation or patience is None:
            return []
        return [Problem(f"got {patience!r}, which has no effect without data.validation", (key, "data.validation"))]

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
        """Values that have to be equal for a run to be resumed: dotted key → JSON value.

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
