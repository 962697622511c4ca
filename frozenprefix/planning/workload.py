"""How much a run has to do, and how long that takes on a machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from frozenprefix.config import ContrastiveRecipe, Recipe
from frozenprefix.data.samples import ImageGroup
from frozenprefix.planning.calibration import MeasuredSteps
from frozenprefix.planning.costs import StepShape


@dataclass(frozen=True)
class MachinePlan:
    """A recipe on one machine.

    Attributes:
        encode_per_second: images from files to the cache.
        seconds_to_encode: of the images that are not in the cache yet.
        seconds_to_train: of all steps and validations; seconds_to_validate: of the validations.
        steps: fewer than the recipe's if `max_minutes` ends the run.
        fits: whether memory suffices, None if unknown.

    Example:
        >>> workload = Workload(to_encode=8, steps=6, validated=4, images_per_step=4, max_minutes=None, cached=True)
        >>> workload.on_machine("laptop", step=0.5, encode=0.25, validation=0.25, fits=True).seconds_to_train
        4.0
    """

    label: str
    seconds_per_step: float
    encode_per_second: float
    seconds_to_encode: float
    seconds_to_train: float
    seconds_to_validate: float
    steps: int
    fits: bool | None


@dataclass(frozen=True)
class Workload:
    """The work of a run.

    Attributes:
        to_encode: images that are not in the feature cache yet.
        steps: training steps, unless `max_minutes` ends the run earlier.
        validated: images of all validations.
        cached: whether features are kept; without a cache images are encoded in every step.
    """

    to_encode: int
    steps: int
    validated: int
    images_per_step: int
    max_minutes: float | None
    cached: bool

    @classmethod
    def from_recipe(
        cls, recipe: Recipe | ContrastiveRecipe, groups: dict[str, list[ImageGroup]], to_encode: int
    ) -> Workload:
        settings = recipe.training
        steps = count_steps(recipe, len(groups["train"]))
        images = len(groups.get("validation", [])[: settings.validation_images])
        # before the first step, every validate_every steps, and at the end
        times = 1 + math.ceil(steps / settings.validate_every)
        cached = recipe.data.feature_cache != "off"
        return cls(to_encode, steps, images * times, settings.images_per_step, settings.max_minutes, cached)

    def on_machine(self, label: str, step: float, encode: float, validation: float, fits: bool | None) -> MachinePlan:
        """The plan for a machine.

        Args:
            step, encode, validation: seconds of a step, of encoding an image, and of validating on one.
            fits: whether memory suffices.
        """
        if not self.cached:
            step += self.images_per_step * encode
            validation += encode
        seconds = self.steps * step + self.validated * validation
        limit = math.inf if self.max_minutes is None else 60 * self.max_minutes
        return MachinePlan(
            label,
            seconds_per_step=step,
            encode_per_second=1 / encode,
            seconds_to_encode=self.to_encode * encode if self.cached else 0.0,
            seconds_to_train=min(seconds, limit),
            seconds_to_validate=self.validated * validation * min(1.0, limit / seconds),
            steps=round(self.steps * min(1.0, limit / seconds)),
            fits=fits,
        )


def seconds_per_step(measured: MeasuredSteps, work: Callable[[StepShape], float], step: StepShape) -> float:
    """Time of a step, from the median time per operation of the measured ones.

    Args:
        work: operations of a step of a given size.

    Example:
        >>> steps = [StepShape(*[1.0] * 8), StepShape(*[2.0] * 8)]
        >>> seconds_per_step(MeasuredSteps(steps, [0.1, 0.2], 0.0), lambda step: step.cells, StepShape(*[4.0] * 8))
        0.4
    """
    rates = sorted(seconds / work(shape) for shape, seconds in zip(measured.shapes, measured.seconds, strict=True))
    return rates[len(rates) // 2] * work(step)


def count_steps(recipe: Recipe | ContrastiveRecipe, images: int) -> int:
    """Training steps of a recipe with so many training images.

    Example:
        >>> count_steps(recipe, 8)
        6
    """
    settings = recipe.training
    return settings.max_steps or -(-(settings.epochs or 1) * images // settings.images_per_step)
