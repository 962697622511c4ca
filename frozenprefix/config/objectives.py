"""The `objectives` block of a recipe: the terms of the loss and their weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from frozenprefix.config.sections import RecipeSection
from frozenprefix.errors import Problem
from frozenprefix.models.configuration import ContrastiveConfig

Share = Annotated[float, Field(ge=0)]
Weight = Share | tuple[Share, Share]


class ContrastiveObjective(ContrastiveConfig):
    """Images and their captions in one space, as in FROMAGe (Koh et al. 2023): the model's heads, and their weight."""

    weight: Weight = Field(1.0, description="a number, or [start, end]")

    @property
    def heads(self) -> ContrastiveConfig:
        """The section of the model's config."""
        return ContrastiveConfig(dim=self.dim, loss=self.loss)


class DistillationSection(RecipeSection):
    """Keeps an adapted LM close to the bare one on text."""

    weight: Weight = Field(1.0, description="a number, or [start, end]")
    texts: str = Field("targets", min_length=1, description="'targets', or a text file")


class SelfCriticalSection(RecipeSection):
    """Policy gradient on CIDEr-D (Rennie et al. 2017), and on the share of words that a reference has."""

    weight: Weight = Field(1.0, description="a number, or [start, end]")
    baseline: Literal["greedy", "leave_one_out"] = "greedy"
    samples: int = Field(5, ge=1, description="captions sampled per image")
    max_new_tokens: int = Field(20, ge=1)
    word_precision: float = Field(
        0.0, ge=0, description="weight, beside CIDEr-D, of the share of a caption's words that a reference has"
    )

    def problems(self) -> list[Problem]:
        if self.baseline == "leave_one_out" and self.samples < 2:
            return [Problem("got 1, expected at least 2 for the baseline 'leave_one_out'", ("samples", "baseline"))]
        return []


class ObjectivesSection(RecipeSection):
    """Parts of the loss, which is their weighted sum. A weight of `[start, end]` changes linearly over the run."""

    lm: Weight = Field(1.0, description="weight of the next token's loss: a number, or [start, end]")
    contrastive: ContrastiveObjective | None = None
    distillation: DistillationSection | None = None
    self_critical: SelfCriticalSection | None = None

    def problems(self) -> list[Problem]:
        problems = []
        for name in ("contrastive", "distillation", "self_critical"):
            section = getattr(self, name)
            if section is not None and not is_used(section.weight):
                text = f"got {section.weight}, which has no effect; expected a weight above 0, or {name} removed"
                problems.append(Problem(text, (f"{name}.weight",)))
        if not is_used(self.lm) and self.contrastive is None and self.self_critical is None:
            text = "got 0 with nothing else that learns from images; expected a weight above 0"
            problems.append(Problem(text, ("lm",)))
        return problems


def is_used(weight: Weight) -> bool:
    """Whether a weight is above 0 at any time of the run.

    Example:
        >>> is_used((0.0, 0.5)), is_used(0.0)
        (True, False)
    """
    return weight_at(weight, 0.0) > 0 or weight_at(weight, 1.0) > 0


def weight_at(weight: Weight, done: float) -> float:
    """The weight at a point of the run.

    Args:
        done: share of the run that is done, from 0 to 1.

    Example:
        >>> weight_at((1.0, 0.0), 0.25)
        0.75
    """
    start, end = weight if isinstance(weight, tuple) else (weight, weight)
    return start + (end - start) * min(1.0, max(0.0, done))
