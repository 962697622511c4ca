"""The samples of an evaluation: from a folder of data, or the validation data of the checkpoint's own recipe."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from frozenprefix.config import Recipe, load_checkpoint_recipe
from frozenprefix.config.sections import EvaluationSection
from frozenprefix.data.cache_format import MANIFEST, Fingerprint, load_manifest, plain_fingerprint
from frozenprefix.data.features import FeatureStorage
from frozenprefix.data.images import BadImages
from frozenprefix.data.samples import Sample, check_unique_ids, with_images, with_targets
from frozenprefix.data.sources import detect_sources, load_source, load_sources
from frozenprefix.data.sources.selection import first_images
from frozenprefix.errors import ConfigError, FrozenPrefixError
from frozenprefix.utils import report

if TYPE_CHECKING:
    from frozenprefix.data.image_encoder import ImageEncoder

#: (type of source, task) → fields without which the source gives no sample of that task.
_TASK_FIELDS: dict[tuple[str, str], dict[str, Any]] = {
    ("easy_vqa", "caption"): {"captions": True},
    ("easy_vqa", "classification"): {"classes": "color shape"},
    ("image_folder", "classification"): {"labels": True},
}


def folder_samples(data: str | Path, task: str, **options: Any) -> list[Sample]:
    """The samples of one task in a folder; `options` are those of its data source.

    Example:
        >>> len(folder_samples(data_folder, "caption", limit=2))
        2
    """
    sources = [{**source, **options} for source in detect_sources(data, options.get("split"))]
    for source in sources:
        source |= _TASK_FIELDS.get((source["type"], task), {})
        if source["type"] == "image_folder" and source.get("split") is not None:
            source["split_folders"] = True
    samples = [sample for source in sources for sample in load_source(source) if sample.task == task]
    return with_images(samples, where=str(data))


def folder_training_samples(data: str | Path, task: str, split: str | None) -> list[Sample]:
    """The folder's own training split, for baselines; empty when that is the split to evaluate."""
    if split in (None, "train"):
        return []
    return [sample for sample in folder_samples(data, task) if sample.split == "train"]


def recipe_samples(checkpoint: str | Path, task: str, part: str, *, limit: int | None = None) -> list[Sample]:
    """The samples of one task among the sources that the checkpoint's recipe names.

    Args:
        part: "train", which is empty after training on texts alone, or "validation".
        limit: take the first `limit` images.

    Raises:
        ConfigError: the checkpoint has no recipe, or one without such sources.
    """
    recipe = load_checkpoint_recipe(checkpoint)
    if part == "train" and recipe is not None and recipe.data.text_only is not None:
        return []  # training has never seen their images
    sources = [] if recipe is None else getattr(recipe.data, part)
    if not sources:
        why = "holds no recipe.yaml" if recipe is None else f"has a recipe without data.{part}"
        raise ConfigError(f"--data: missing, and {checkpoint} {why}; give a folder of data")
    samples = [sample for sample in load_sources(sources) if sample.task == task]
    return first_images(with_images(samples, where=f"data.{part}"), limit)


def recipe_images(checkpoint: str | Path, part: str = "validation") -> list[Path]:
    """Images of the checkpoint's own data that are on this machine; none without a recipe, or where they have moved.

    Args:
        part: "validation" or "train".

    Example:
        >>> recipe_images(checkpoint)  # saved without a recipe
        []
    """
    try:
        recipe = load_checkpoint_recipe(checkpoint)
        sources = [] if recipe is None else getattr(recipe.data, part)
        samples = load_sources(sources) if sources else []
    except FrozenPrefixError:
        return []
    return list(dict.fromkeys(path for sample in samples for path in sample.images if path.is_file()))


def other_images(
    encoder: ImageEncoder, candidates: Sequence[Path], count: int, *, without: Collection[Path] = ()
) -> Tensor:
    """Features float[M, N, D_enc] of up to `count` images, for evidence; the same ones for the same candidates.

    They are drawn from all candidates, as neighbours in a folder are often alike. Those that cannot be read are left
    out.

    Args:
        without: images that are not drawn.

    Example:
        >>> paths = sorted(images_folder.iterdir())
        >>> len(other_images(captioner.encoder, paths, 4, without=paths[:1]))
        4
    """
    own = {path.resolve() for path in without}
    files = sorted({path for path in candidates if path.resolve() not in own})
    chosen = random.Random(0).sample(files, min(count, len(files)))
    found = [features.cpu() for _, features in encoder.batches(chosen, 8, BadImages())]
    return torch.cat(found) if found else torch.empty(0)


def check_samples_of(samples: Sequence[Sample], task: str) -> list[Sample]:
    """The samples that can be scored: those with a target. The others are counted in the log.

    Raises:
        ConfigError: for samples of another task.
        DataError: for ids that occur twice, or when no sample has a target.

    Example:
        >>> samples = folder_samples(data_folder, "caption")
        >>> check_samples_of(samples, "caption") == samples
        True
    """
    tasks = sorted({sample.task for sample in samples})
    if tasks != [task]:
        raise ConfigError(f"task '{task}' evaluates samples of task '{task}', got {', '.join(tasks) or 'no sample'}")
    check_unique_ids(samples)
    return with_targets(samples, where=f"task '{task}'")


def join_captions(samples: Sequence[Sample], *, where: str = "data") -> list[Sample]:
    """One sample per image and prompt, with the captions of all samples of that image as references.

    Data with one caption a row would otherwise be scored against one reference each.

    Example:
        >>> rows = [Sample("a", (image_path,), ("a dog",)), Sample("b", (image_path,), ("a brown dog",))]
        >>> [(sample.id, sample.targets) for sample in join_captions(rows)]
        [('a', ('a dog', 'a brown dog'))]
    """
    references: dict[tuple[Path, ...], list[str]] = {}
    first: dict[tuple[Any, ...], Sample] = {}
    for sample in samples:
        references.setdefault(sample.images, []).extend(sample.targets)
        first.setdefault((sample.images, sample.prompt), sample)
    report(where, len(samples), {"same image and prompt": len(samples) - len(first)}, done="joined", what="samples")
    return [replace(sample, targets=tuple(references[sample.images])) for sample in first.values()]


def recipe_storage(checkpoint: str | Path, fingerprint: Fingerprint) -> FeatureStorage:
    """Where the checkpoint's recipe keeps image features.

    A folder that is not on this machine, or holds features computed in another dtype, counts as "auto".

    Args:
        fingerprint: of the encoder's features.

    Raises:
        ConfigError: for a recipe.yaml that cannot be read.
    """
    recipe = load_checkpoint_recipe(checkpoint)
    if recipe is None:
        return FeatureStorage()
    place = Path(recipe.data.feature_cache)
    storage = recipe.data.feature_storage
    if storage.feature_cache == "off" or (place.is_dir() and not (place / MANIFEST).is_file()):
        return storage
    key = "encoder.dtype"
    if place.is_dir() and load_manifest(place).fingerprint.get(key) == plain_fingerprint(fingerprint).get(key):
        return storage
    return replace(storage, feature_cache="auto")


def recipe_defaults(checkpoint: str | Path) -> EvaluationSection:
    """Defaults of an evaluation in the checkpoint's recipe."""
    recipe = load_checkpoint_recipe(checkpoint)
    return recipe.evaluation if isinstance(recipe, Recipe) else EvaluationSection()
