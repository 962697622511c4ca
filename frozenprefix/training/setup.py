"""From a recipe to the parts that the loop needs: model, processor, data."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL.Image import Image

from frozenprefix.assets import user_cache
from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.cache_encode import encode_pictures
from frozenprefix.data.images import BadPictures, load_image
from frozenprefix.data.samples import PictureGroup, Sample, check_unique_ids, group_by_pictures
from frozenprefix.data.sources import load_source
from frozenprefix.errors import BadImageError, DataError
from frozenprefix.models.configuration import FrozenPrefixConfig, VisionEncoderConfig
from frozenprefix.models.fusion import FUSIONS
from frozenprefix.models.language_model import load_tokenizer
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.models.vision import VisionEncoder, build_vision_encoder
from frozenprefix.training.recipe import Recipe
from frozenprefix.training.sections import DataSection

logger = logging.getLogger(__name__)


def build_model(recipe: Recipe) -> tuple[FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor]:
    """Build the model of a recipe, and its processor."""
    sections = recipe.model
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
    )
    torch.manual_seed(recipe.seed)
    return FrozenPrefixForConditionalGeneration(config, vision_encoder=encoder.module), processor


def load_samples(sources: Sequence[Any], part: str) -> list[Sample]:
    """Load and join sources. Empty targets, and samples that have no other, are left out and counted in the log.

    Raises:
        DataError: when nothing is left, or two sources share sample ids.
    """
    samples = [sample for source in sources for sample in load_source(source)]
    check_unique_ids(samples)
    kept = [replace(s, targets=tuple(text for text in s.targets if text.strip())) for s in samples]
    empty = sum(len(before.targets) - len(after.targets) for before, after in zip(samples, kept, strict=True))
    if empty:
        logger.warning("data.%s: %d empty targets are left out", part, empty)
    if not any(sample.targets for sample in kept):
        raise DataError(f"data.{part}: {len(samples)} samples, none with a target to learn; check path and split")
    return [sample for sample in kept if sample.targets]


def load_parts(data: DataSection) -> dict[str, list[Sample]]:
    """Load the samples for training and, when there are sources for it, for validation."""
    samples = {"train": load_samples(data.train, "train")}
    if data.validation:
        samples["validation"] = load_samples(data.validation, "validation")
    return samples


@dataclass(frozen=True)
class Processes:
    """The processes that share the pictures among them; the default is one alone.

    Args:
        rank, count: number of this process, and how many there are.
        barrier: waits for all of them.
        gather: the list of this process → the lists of all processes, joined.
    """

    rank: int = 0
    count: int = 1
    barrier: Callable[[], None] | None = None
    gather: Callable[[list[Any]], list[Any]] = list

    @classmethod
    def of(cls, accelerator: Accelerator) -> Processes:
        return cls(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone, gather_object)


@dataclass(frozen=True)
class PictureEncoder:
    """The frozen encoder, the image processor that feeds it, and what its features depend on besides the picture."""

    module: VisionEncoder
    image_processor: Any
    fingerprint: dict[str, str | int]

    @classmethod
    def build(cls, config: VisionEncoderConfig) -> PictureEncoder:
        """Build the encoder alone, without a language model."""
        built = build_vision_encoder(config)
        return cls(
            built.module, built.image_processor, feature_fingerprint(config, built.identity, built.image_processor)
        )

    @classmethod
    def of(cls, model: FrozenPrefixForConditionalGeneration, processor: FrozenPrefixProcessor) -> PictureEncoder:
        """The encoder of a model."""
        config = VisionEncoderConfig.model_validate(model.config.vision_encoder)
        identity = model.config.identity["vision_encoder"]
        return cls(
            model.vision_encoder,
            processor.image_processor,
            feature_fingerprint(config, identity, processor.image_processor),
        )

    def pixels(self, image: Image) -> torch.Tensor:
        """RGB picture -> float[1, 3, H, W]."""
        return self.image_processor(image, return_tensors="pt")["pixel_values"]

    @property
    def batch_size(self) -> int:
        """Pictures to encode at once. On CPUs few: a layer's output then stays in the caches until the next reads it
        (EfficientNet-Lite0 in bfloat16 made 230 pictures/s in eights and 150 in batches of 32)."""
        return 8 if next(self.module.parameters()).device.type == "cpu" else 64

    @torch.inference_mode()
    def encode(self, pixel_values: list[torch.Tensor]) -> np.ndarray:
        """float[1, 3, H, W] each -> float32[n, N, D_enc]."""
        device = next(self.module.parameters()).device
        return self.module(torch.cat(pixel_values).to(device)).float().cpu().numpy()


def feature_fingerprint(
    config: VisionEncoderConfig, identity: dict[str, str], image_processor: Any
) -> dict[str, str | int]:
    """What image features depend on, apart from the picture."""
    section = config.model_dump(mode="json", exclude={"weights", "revision"})
    return {
        **{f"encoder.{k}": json.dumps(v) for k, v in section.items()},
        **{f"weights.{k}": v for k, v in identity.items()},
        "preprocessing": image_processor.to_json_string(),
    }


def feature_folder(data: DataSection, fingerprint: dict[str, str | int]) -> Path:
    """Where a recipe's features lie. With "auto" it is a folder in the user's cache, named by the fingerprint."""
    if data.feature_cache != "auto":
        return Path(data.feature_cache)
    name = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
    return user_cache() / "features" / (name if data.feature_dtype == "float16" else f"{name}-{data.feature_dtype}")


def pictures_of(groups: Iterable[PictureGroup]) -> list[Path]:
    """Every picture file once, in order of first use."""
    return list(dict.fromkeys(path for group in groups for path in group.images))


@dataclass
class PreparedPictures:
    """What training needs to know about its pictures.

    Attributes:
        groups: for each part, the groups whose pictures can be read.
        features: the features of their pictures, when cached.
        bad: what cannot be read.
        pictures: picture files, bad ones included; encoded: those that were encoded now. Of all processes.
    """

    groups: dict[str, list[PictureGroup]]
    features: FeatureCache | None
    bad: BadPictures
    pictures: int
    encoded: int


def prepare_pictures(
    encoder: PictureEncoder,
    samples: dict[str, list[Sample]],
    data: DataSection,
    *,
    processes: Processes | None = None,
    bad_list: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PreparedPictures:
    """Encode every picture once into the feature cache, and drop groups with a picture that cannot be read.

    With `feature_cache: off` pictures are only read, to know the bad ones before the first step. Several processes
    each take their share of the pictures; all of them get the same result.

    Args:
        data: the recipe's section: where features are kept and how, and what share of pictures may be bad.
        processes: who takes part.
        bad_list: JSONL file that lists the bad pictures; removed when there are none.
        progress: called with (pictures done, pictures in all) of this process.

    Raises:
        DataError: when too many pictures are bad.
        CacheError: for a cache folder that is damaged, or was made with another encoder.
    """
    processes = processes or Processes()
    groups = {part: group_by_pictures(listed) for part, listed in samples.items()}
    paths = pictures_of(group for listed in groups.values() for group in listed)
    bad = BadPictures()
    features, encoded = None, 0

    def encode(pixel_values: list[torch.Tensor]) -> np.ndarray:
        nonlocal encoded
        encoded += len(pixel_values)
        return encoder.encode(pixel_values)

    try:
        if data.feature_cache == "off":
            mine = paths[processes.rank :: processes.count]
            find_unreadable(mine, bad, workers=max(1, data.workers), progress=progress)
        else:
            features = encode_pictures(
                paths,
                encode,
                feature_folder(data, encoder.fingerprint),
                encoder.fingerprint,
                dtype=data.feature_dtype,
                transform=encoder.pixels,
                batch_size=encoder.batch_size,
                workers=max(1, data.workers),
                bad=bad,
                max_bad_share=data.max_bad_share,
                progress=progress,
                rank=processes.rank,
                world_size=processes.count,
                barrier=processes.barrier,
            )
        _share(bad, processes)
    finally:
        if bad_list is not None:
            bad_list.unlink(missing_ok=True)
            if len(bad):
                bad.write(bad_list)
                logger.warning("%d of %d pictures cannot be used; %s lists them", len(bad), len(paths), bad_list)
    bad.check(len(paths), data.max_bad_share)
    kept = {part: [g for g in listed if not any(path in bad for path in g.images)] for part, listed in groups.items()}
    return PreparedPictures(kept, features, bad, len(paths), sum(processes.gather([encoded])))


def _share(bad: BadPictures, processes: Processes) -> None:
    """Let every process know the bad pictures of all, or they would not train on the same groups."""
    for path, reason, message in processes.gather([(path, error.reason, str(error)) for path, error in bad]):
        bad.record(path, BadImageError(reason, message))


def find_unreadable(
    paths: Sequence[Path],
    bad: BadPictures,
    *,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Decode every picture once, in threads, and record those that cannot be read."""

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
