"""What a checkpoint is evaluated on: a folder of data, or the validation data of its own recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frozenprefix.config import Recipe, load_checkpoint_recipe
from frozenprefix.config.sections import EvaluationSection
from frozenprefix.data.features import FeatureStorage
from frozenprefix.data.samples import Sample
from frozenprefix.data.sources import detect_sources, load_source, load_sources
from frozenprefix.data.sources.selection import first_images
from frozenprefix.errors import ConfigError

#: (type of source, task) → what it must be asked for, or it gives no sample of that task.
_ASKED_FOR: dict[tuple[str, str], dict[str, Any]] = {
    ("easy_vqa", "caption"): {"captions": True},
    ("easy_vqa", "classification"): {"classes": "color shape"},
    ("image_folder", "classification"): {"labels": True},
}


def folder_samples(data: str | Path, task: str, **options: Any) -> list[Sample]:
    """The samples of one task in a folder; `options` are those of its data source."""
    sources = [{**source, **options} for source in detect_sources(data, options.get("split"))]
    for source in sources:
        source |= _ASKED_FOR.get((source["type"], task), {})
        if source["type"] == "image_folder" and source.get("split") is not None:
            source["split_folders"] = True
    return [sample for source in sources for sample in load_source(source) if sample.task == task]


def folder_training_samples(data: str | Path, task: str, split: str | None) -> list[Sample]:
    """The folder's own training split, for baselines; nothing when that is what is evaluated."""
    if split in (None, "train"):
        return []
    return [sample for sample in folder_samples(data, task) if sample.split == "train"]


def recipe_samples(checkpoint: str | Path, task: str, part: str, *, limit: int | None = None) -> list[Sample]:
    """The samples of one task among the sources that the checkpoint's recipe names.

    Args:
        part: "train", which is empty after training on texts alone, or "validation".
        limit: the first so many images.

    Raises:
        ConfigError: the checkpoint holds no recipe, or one without such sources.
    """
    recipe = load_checkpoint_recipe(checkpoint)
    if part == "train" and recipe is not None and recipe.data.text_only is not None:
        return []  # training has never seen their images
    sources = [] if recipe is None else getattr(recipe.data, part)
    if not sources:
        why = "holds no recipe.yaml" if recipe is None else f"has a recipe without data.{part}"
        raise ConfigError(f"--data: not given, and {checkpoint} {why}; give a folder of data")
    return first_images([sample for sample in load_sources(sources) if sample.task == task], limit)


def recipe_storage(checkpoint: str | Path) -> FeatureStorage:
    """Where the checkpoint's recipe keeps image features. A folder that is not on this machine counts as "auto".

    Raises:
        ConfigError: for a recipe.yaml that cannot be read.
    """
    recipe = load_checkpoint_recipe(checkpoint)
    if recipe is None:
        return FeatureStorage()
    place = recipe.data.feature_cache
    return FeatureStorage(place if place == "off" or Path(place).is_dir() else "auto", recipe.data.feature_dtype)


def recipe_defaults(checkpoint: str | Path) -> EvaluationSection:
    """Defaults of an evaluation in the checkpoint's recipe."""
    recipe = load_checkpoint_recipe(checkpoint)
    return recipe.evaluation if isinstance(recipe, Recipe) else EvaluationSection()
