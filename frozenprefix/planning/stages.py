"""The stages of a run, told when it starts: what is done, how much of it, and about how long it takes here."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from frozenprefix.config import ContrastiveRecipe, Recipe
from frozenprefix.kernels.precision import measure_products
from frozenprefix.models.language_model.loading import language_model_config
from frozenprefix.planning.hardware import COMPUTE_SHARE, Hardware
from frozenprefix.planning.plan import Plan, plan
from frozenprefix.planning.step_costs import has_formulas

logger = logging.getLogger(__name__)
MOST_TEXT = 64e6  # bytes of data files that are read a second time for an estimate
# A step of packed rows reaches this share of the rate at which a large matrix product runs alone on a CPU: SmolLM2-135M
# with 12 images of 4 captions (recipes/mlp.yaml), bf16 and fp32.
PRODUCT_SHARE = 0.5
# An evaluated image (beam 5, blind, shuffled) takes as long as so many images of a training step: README, Flickr8k.
EVALUATED = 2.5


@dataclass(frozen=True)
class Stage:
    """A stage and the seconds that it takes; None if that is not known.

    Example:
        >>> Stage("train 200 steps", 61.0).seconds
        61.0
    """

    name: str
    seconds: float | None = None


def estimate_stages(recipe: Recipe | ContrastiveRecipe) -> list[Stage]:
    """The stages of a run, with times where they cost about a second to estimate.

    The arithmetic of a step is counted by formulas, and divided by the rate of matrix products that is measured here;
    eight images are encoded. No weights of the language model are loaded and no step is taken: `plan` with `calibrate`
    does that, and predicts more exactly. An estimate never fails: what is wrong with a recipe, the run itself will say.

    Example:
        >>> [stage.name for stage in estimate_stages(recipe)]
        ['encode ... images', 'train 6 steps', 'validate meanwhile', 'evaluate 4 images afterwards']
    """
    with _quiet():
        try:
            if isinstance(recipe, Recipe) and _is_cheap(recipe):
                return stages_of(plan(recipe, (), calibrate=0, here=_this_machine(recipe)), recipe)
        except Exception as error:  # whatever it is, the run itself meets it again and says so
            logger.debug("no estimate: %s", error)
    settings = recipe.training
    steps = f"{settings.max_steps:,} steps" if settings.max_steps else f"{settings.epochs} epochs"
    names = ["encode images", f"train {steps}", "validate meanwhile", "evaluate afterwards"]
    return [Stage(name) for name in names]


def stages_of(planned: Plan, recipe: Recipe | ContrastiveRecipe) -> list[Stage]:
    """The stages of a plan for this machine, and the evaluation that follows the run.

    Example:
        >>> stages_of(plan(recipe, (), calibrate=0.01), recipe)[-1].name
        'evaluate 4 images afterwards'
    """
    stages = [Stage(name, seconds) for name, seconds in planned.stages("here")]
    images = planned.images["validation"]
    if isinstance(recipe, Recipe):
        images = min(images, recipe.evaluation.limit or images)
    if images:
        seconds = images * EVALUATED * planned.machines["here"].seconds_per_step / planned.images_per_step
        stages.append(Stage(f"evaluate {images:,} images afterwards", seconds))
    return stages


def _is_cheap(recipe: Recipe) -> bool:
    """Whether the data are small and the costs are formulas, on a machine whose rate is measured in an instant.

    With several processes nothing is planned: the first one alone would wait for the others to choose a precision.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return False
    if torch.accelerator.is_available() or recipe.data.streamed or not has_formulas(recipe):
        return False
    return sum(_text_bytes(source) for source in (*recipe.data.train, *recipe.data.validation)) < MOST_TEXT


def _text_bytes(source: dict[str, Any]) -> int:
    """Bytes of the files that a source names, or of those directly in the folder that it names."""
    total = 0
    for value in source.values():
        path = Path(value).expanduser() if isinstance(value, str) else None
        if path is not None and path.is_dir():
            total += sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())
        elif path is not None and path.is_file():
            total += path.stat().st_size
    return total


def _this_machine(recipe: Recipe) -> Hardware:
    """This machine's CPU, by the rate of its matrix products; the rates are scaled for `Hardware`'s own shares."""
    config = language_model_config(recipe.model.language_model).get_text_config()
    hidden = config.hidden_size
    rates = measure_products(hidden, getattr(config, "intermediate_size", None) or 4 * hidden, all_cores=True)
    scale = PRODUCT_SHARE / COMPUTE_SHARE
    # products at this size are bound by arithmetic; the rate of the memory is in what was measured
    bandwidth = float("inf")
    cores = os.cpu_count() or 1
    rate = {"bf16": rates.bfloat16 * scale, "fp32": rates.float32 * scale}
    return Hardware("this machine", "cpu", **rate, bandwidth=bandwidth, memory=None, cores=cores, source="measured")


@contextmanager
def _quiet() -> Iterator[None]:
    """What is found in the data is said once, by the run itself."""
    package = logging.getLogger("frozenprefix")
    level = package.level
    package.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        package.setLevel(level)
