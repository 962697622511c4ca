"""The recipe's `objectives` block: what is learned beside the next token, and how much each part counts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from frozenprefix.config.errors import Problem
from frozenprefix.config.sections import RecipeSection, raise_clash
from frozenprefix.models.configuration import ContrastiveConfig

Share = Annotated[float, Field(ge=0)]
Weight = Share | tuple[Share, Share]


class ContrastiveSection(RecipeSection):
    """Images and their captions in one space, as in FROMAGe (Koh et al. 2023)."""

    weight: Weight = Field(1.0, description="a number, or [start, end]")
    loss: Literal["infonce", "sigmoid"] = "infonce"
    dim: int = Field(256, ge=1, description="size of the shared space")

    @property
    def heads(self) -> ContrastiveConfig:
        return ContrastiveConfig(dim=self.dim, loss=self.loss)


class DistillationSection(RecipeSection):
    """Keeps an adapted LM near the bare one on text."""

    weight: Weight = Field(1.0, description="a number, or [start, end]")
    texts: str = Field("targets", min_length=1, description="'targets', or a text file")


class SelfCriticalSection(RecipeSection):
    """Policy gradient on CIDEr-D (Rennie et al. 2017)."""

    weight: Weight = Field(1.0, description="a number, or [start, end]")
    baseline: Literal["greedy", "leave_one_out"] = "greedy"
    samples: int = Field(5, ge=1, description="captions sampled per image")
    max_new_tokens: int = Field(20, ge=1)

    @model_validator(mode="after")
    def _check_baseline(self) -> SelfCriticalSection:
        if self.baseline == "leave_one_out" and self.samples < 2:
            keys = ("objectives.self_critical.samples", "objectives.self_critical.baseline")
            raise_clash([Problem(keys, f"{keys[0]}: got 1, expected at least 2 for the baseline 'leave_one_out'")])
        return self


class ObjectivesSection(RecipeSection):
    """The loss is the weighted sum of these parts. A weight of `[start, end]` changes linearly over the run."""

    lm: Weight = Field(1.0, description="weight of the next token's loss: a number, or [start, end]")
    contrastive: ContrastiveSection | None = None
    distillation: DistillationSection | None = None
    self_critical: SelfCriticalSection | None = None

    @model_validator(mode="after")
    def _check_something_is_learned(self) -> ObjectivesSection:
        if not is_used(self.lm) and self.contrastive is None and self.self_critical is None:
            keys = ("objectives.lm",)
            line = "objectives.lm: got 0 with nothing else that learns from images; expected a weight above 0"
            raise_clash([Problem(keys, line)])
        return self


def is_used(weight: Weight) -> bool:
    """Whether a weight is ever anything but 0."""
    return weight_at(weight, 0.0) > 0 or weight_at(weight, 1.0) > 0


def weight_at(weight: Weight, done: float) -> float:
    """The weight when this share of the run is done, 0 to 1."""
    start, end = weight if isinstance(weight, tuple) else (weight, weight)
    return start + (end - start) * min(1.0, max(0.0, done))
