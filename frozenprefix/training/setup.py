"""From a recipe to the model, its processor and the data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from frozenprefix.config import ContrastiveRecipe, Recipe, resolve_precision
from frozenprefix.config.sections import DataSection
from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.caption_retriever import CaptionRetriever, ImageLookup
from frozenprefix.data.check import Leak, find_leaks
from frozenprefix.data.features import fill_feature_cache, share_bad_images
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.data.images import BadImages, load_image
from frozenprefix.data.samples import ImageGroup, Sample, group_by_images, with_images, with_targets
from frozenprefix.data.sources import load_sources
from frozenprefix.errors import BadImageError, ConfigError
from frozenprefix.models.configuration import FrozenPrefixConfig
from frozenprefix.models.contrastive.configuration import LockedImageTextConfig
from frozenprefix.models.contrastive.modeling import LockedImageTextModel
from frozenprefix.models.contrastive.processing import LockedImageTextProcessor, OpenClipProcessor
from frozenprefix.models.contrastive.text_tower import build_text_tower
from frozenprefix.models.fusion import FUSIONS
from frozenprefix.models.language_model.loading import load_tokenizer
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.models.vision import build_vision_encoder
from frozenprefix.models.vision.precomputed import feature_table
from frozenprefix.utils import file_sha256, progress_bar
from frozenprefix.utils.processes import current_processes

logger = logging.getLogger(__name__)

MOST_TOKENS = 16_384  # image tokens that a mapper is fitted to


def build_model(recipe: Recipe) -> tuple[FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor]:
    """Build the model of a recipe, and its processor.

    Example:
        >>> model, processor = build_model(recipe)
        >>> processor.prefix_length
        2
    """
    sections = resolve_precision(recipe).model
    encoder = build_vision_encoder(sections.vision_encoder)
    processor = FrozenPrefixProcessor(
        encoder.image_processor,
        load_tokenizer(sections.language_model),
        prefix_length=FUSIONS.get(sections.fusion.type).placeholders(sections.mapper.prefix_length),
        prompts=recipe.data.prompts,
    )
    config = FrozenPrefixConfig(
        vision_encoder=sections.vision_encoder,
        mapper=sections.mapper,
        language_model=sections.language_model,
        fusion=sections.fusion,
        identity={"vision_encoder": encoder.identity},
        image_token_id=processor.image_token_id,
        contrastive=None if recipe.objectives.contrastive is None else recipe.objectives.contrastive.heads,
        unit_features=recipe.data.text_only is not None,
    )
    torch.manual_seed(recipe.seed)
    return FrozenPrefixForConditionalGeneration(config, vision_encoder=encoder.module), processor


def build_locked_model(
    recipe: ContrastiveRecipe,
) -> tuple[LockedImageTextModel, LockedImageTextProcessor | OpenClipProcessor]:
    """Build the model of a contrastive recipe, and its processor.

    Example:
        >>> from frozenprefix.config import load_recipe
        >>> model, processor = build_locked_model(load_recipe("recipes/lit_flickr8k.yaml"))  # doctest: +SKIP
    """
    sections = resolve_precision(recipe).model
    encoder, tower = build_vision_encoder(sections.vision_encoder), build_text_tower(sections.text_tower)
    config = LockedImageTextConfig(
        vision_encoder=sections.vision_encoder,
        text_tower=sections.text_tower,
        image_projection=sections.image_projection,
        text_projection=sections.text_projection,
        projection_dim=sections.projection_dim,
        objective=sections.objective,
        identity={"vision_encoder": encoder.identity, "text_tower": tower.identity},
        text_config=tower.text_config,
    )
    torch.manual_seed(recipe.seed)
    model = LockedImageTextModel(config, encoder.module, tower.module)
    if tower.tokenizer is None:
        return model, OpenClipProcessor(encoder.image_processor, open_clip_name=sections.text_tower.path)
    return model, LockedImageTextProcessor(encoder.image_processor, tower.tokenizer)


def load_validation(data: DataSection) -> list[Sample]:
    """The samples for validation; those without an image, which cannot be shuffled, are left out."""
    return with_images(load_samples(data.validation, "validation"), where="data.validation") if data.validation else []


def load_samples(sources: Sequence[Any], part: str, *, images: bool = True) -> list[Sample]:
    """Load and join sources. Empty targets, and samples with no other target, are left out and counted in the log.

    Args:
        part: "train" or "validation", for messages.
        images: False for training on text alone: the image files need not exist.

    Raises:
        DataError: when no sample is left, or two sources share sample ids.

    Example:
        >>> len(load_samples([{"type": "captions", "path": str(data_folder)}], "train"))
        12
    """
    return with_targets(load_sources(sources, images=images), where=f"data.{part}")


def load_parts(data: DataSection, *, without_images: bool = False) -> dict[str, list[Sample]]:
    """Load the samples for training and, if the recipe has sources for it, for validation.

    Args:
        without_images: keep training samples that show no image. They teach a language model that has trained parts,
            and a frozen one nothing. Validation, which compares right and wrong images, always leaves them out.
    """
    if data.streamed:
        raise ConfigError(
            "data.train: got streamed sources, whose features are not cached one by one; write them into shards with "
            "`frozenprefix data build SOURCE OUT --recipe RECIPE`"
        )
    train = load_samples(data.train, "train", images=data.text_only is None)
    samples = {"train": train if without_images else with_images(train, where="data.train")}
    return samples | ({"validation": load_validation(data)} if data.validation else {})


def images_of(groups: Iterable[ImageGroup]) -> list[Path]:
    """Every image file once, in order of first use."""
    return list(dict.fromkeys(path for group in groups for path in group.images))


def fit_mapper(
    model: FrozenPrefixForConditionalGeneration, groups: Sequence[ImageGroup], features: FeatureCache | None
) -> None:
    """Show features of training images, evenly chosen, to a mapper that has to see them before the first step.

    Raises:
        ConfigError: for such a mapper without cached features.
    """
    body = model.mapper.body
    fit = getattr(body, "fit_inputs", None)
    if fit is None:
        return
    if features is None or not isinstance(groups, list):
        raise ConfigError(
            f"model.mapper: {type(body).__name__} is fitted to the features of all training images; it needs "
            "data.feature_cache, and no streamed sources"
        )
    paths = images_of(groups)
    most = max(1, MOST_TOKENS // model.vision_encoder.num_tokens)
    some = paths[:: -(-len(paths) // most)]
    fit(torch.from_numpy(features.get(features.keys_of(some)).astype(np.float32)))


@dataclass
class PreparedImages:
    """Result of `prepare_images`, the same on all processes.

    Attributes:
        groups: for each part, the groups whose images can be read.
        features: the features of their images, if they are cached or precomputed.
        view_features: of the training images with `data.augmentation`, a cache for each view, the whole image first.
        bad: images that cannot be read.
        images: number of image files, bad ones included; encoded: number of those that were encoded now.
    """

    groups: dict[str, list[ImageGroup]]
    features: FeatureCache | None
    bad: BadImages
    images: int
    encoded: int
    view_features: list[FeatureCache] | None = None


def prepare_images(
    encoder: ImageEncoder,
    samples: dict[str, list[Sample]],
    data: DataSection,
    *,
    processes: PartialState | None = None,
    bad_list: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PreparedImages:
    """Encode every image once into the feature cache, and drop groups with an image that cannot be read.

    With `feature_cache: off` images are only decoded, to find the bad ones before the first step. Precomputed features
    are looked up, and no image is read. Several processes share the images; all of them must call this.

    Args:
        data: the recipe's section: the feature cache, and the share of images that may be bad.
        bad_list: JSONL file for the bad images; removed if there are none.
        progress: called with (images done, images in all) of this process.

    Raises:
        DataError: when too many images are bad, or precomputed features lack some.
        CacheError: for a cache folder that is damaged, or was written with another encoder.
    """
    processes = processes or current_processes()
    groups = {part: group_by_images(listed) for part, listed in samples.items()}
    paths = images_of(group for listed in groups.values() for group in listed)
    bad = BadImages()
    features, encoded, view_features = None, 0, None

    table = feature_table(encoder.module)
    try:
        if not paths:
            pass  # all images are streamed
        elif table is not None:
            table.keys_of(paths)
            features = cast(FeatureCache, table)  # it has the methods that training calls
        elif data.feature_cache == "off":
            mine = paths[processes.process_index :: processes.num_processes]
            find_unreadable(mine, bad, workers=max(1, data.workers), progress=progress)
        else:
            caches, encoded = _fill_caches(
                encoder, paths, images_of(groups.get("train", ())), data, bad, processes, progress
            )
            features = caches[0]
            if data.augmentation is not None:
                view_features = [cache for cache in caches if cache is not None]
        share_bad_images(bad)
    finally:
        if bad_list is not None:
            bad_list.unlink(missing_ok=True)
            if len(bad):
                bad.write(bad_list)
                bad.report("data", len(paths))
    bad.check(len(paths), data.max_bad_share)
    readable = {
        part: [g for g in listed if not any(path in bad for path in g.images)] for part, listed in groups.items()
    }
    return PreparedImages(readable, features, bad, len(paths), sum(gather_object([encoded])), view_features)


def _fill_caches(
    encoder: ImageEncoder,
    paths: Sequence[Path],
    training: Sequence[Path],
    data: DataSection,
    bad: BadImages,
    processes: PartialState,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[FeatureCache | None], int]:
    """A feature cache of all images, and one of the training images for each further view; and how many were encoded.

    A cache is None when not one image can be read.
    """
    views = data.further_views
    caches, encoded, done = [], 0, 0
    in_all = len(paths) + len(views) * len(training)
    for view in (None, *views):
        if view is not None:
            share_bad_images(bad)  # the processes divide a list that has to be the same for all
        listed = list(paths) if view is None else [path for path in training if path not in bad]

        def count(images: int, _: int, before: int = done) -> None:
            if progress is not None:
                progress(before + images, in_all)

        cache, added = fill_feature_cache(
            replace(encoder, view=view),
            listed,
            data.feature_storage,
            bad=bad,
            max_bad_share=data.max_bad_share,
            workers=data.workers,
            processes=processes,
            progress=count,
        )
        caches.append(cache)
        encoded, done = encoded + added, done + len(listed)
    return caches, encoded


def find_shared_images(prepared: PreparedImages) -> list[Leak]:
    """Images that are in both parts, by path or by content.

    Example:
        >>> samples = load_samples([{"type": "captions", "path": str(data_folder)}], "train")
        >>> encoder = ImageEncoder.from_model(model, processor)
        >>> prepared = prepare_images(encoder, {"train": samples, "validation": samples[:2]}, recipe.data)
        >>> len(find_shared_images(prepared))
        2
    """
    parts: dict[Path, list[str]] = {}
    for part, groups in prepared.groups.items():
        for path in images_of(groups):
            parts.setdefault(path, []).append(part)
    if len(prepared.groups) < 2:
        return []
    if prepared.features is not None:
        return find_leaks(parts, dict(zip(parts, prepared.features.keys_of(parts), strict=True)))
    # hash only the files whose size occurs in both parts
    sizes = {path: path.stat().st_size for path in parts}
    by_part = [{sizes[path] for path, names in parts.items() if part in names} for part in prepared.groups]
    shared = set.intersection(*by_part)
    return find_leaks(parts, {path: file_sha256(path) for path in parts if sizes[path] in shared})


def add_similar_captions(prepared: PreparedImages, data: DataSection) -> CaptionRetriever | None:
    """Put captions of similar training images into all caption prompts of `prepared`, if the recipe says so.

    Returns:
        The retriever, to be saved with the model, also if it only chooses among beams; None for a recipe without
        `data.retrieval`.

    Raises:
        DataError: for a caption sample with several images, or captions of fewer than two training images.
    """
    if data.retrieval is None:
        return None
    cache = prepared.features
    assert cache is not None  # a recipe without features is refused
    samples = {part: [s for group in groups for s in group.samples] for part, groups in prepared.groups.items()}
    retriever = CaptionRetriever.from_samples(samples["train"], cache, data.retrieval)
    if not data.retrieval.prompts:
        return retriever
    lookup = ImageLookup.from_cache(cache)
    for part, listed in samples.items():
        with progress_bar(f"retrieving captions ({part})") as update:
            prompted = retriever.with_prompts(listed, lookup, prompt=data.prompts["caption"], progress=update)
        prepared.groups[part] = group_by_images(prompted)
    return retriever


def find_unreadable(
    paths: Sequence[Path],
    bad: BadImages,
    *,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Decode every image once, in threads, and record those that cannot be read."""

    def error_of(path: Path) -> BadImageError | None:
        try:
            load_image(path)
        except BadImageError as error:
            return error
        return None

    with ThreadPoolExecutor(workers) as pool:
        for done, (path, error) in enumerate(zip(paths, pool.map(error_of, paths), strict=True), start=1):
            if error is not None:
                bad.record(path, error)
            if progress is not None:
                progress(done, len(paths))
