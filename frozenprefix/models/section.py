"""Base classes of typed sections, which serve both a checkpoint's config.json and a recipe's `model` block."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator
from typing_extensions import Self

from frozenprefix.errors import Problem, SectionError

DType = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A config section. Unknown keys are refused, and values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())

    def problems(self) -> list[Problem]:
        """Conflicts between values that are valid on their own."""
        return []

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        SectionError.check(self.problems())
        return self


class PartConfig(BaseModel):
    """A part of the model that is chosen by its `type`. Undeclared keys are the part's own options."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    type: str

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for the part's constructor."""
        return dict(self.model_extra or {})


class PeftMethodConfig(PartConfig):
    """Which peft method adapts a frozen part.

    Example:
        >>> PeftMethodConfig(type="lora", r=8).options
        {'r': 8}
    """
