"""The cost of a recipe before it is run: parameters, memory, arithmetic, disk and time, here and on other machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from frozenprefix.config import ContrastiveRecipe, Recipe, resolve_precision
from frozenprefix.data.cache import FeatureCache, ImageKeys
from frozenprefix.data.cache_format import MANIFEST
from frozenprefix.data.features import feature_folder
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.data.samples import ImageGroup, group_by_images
from frozenprefix.models.vision.precomputed import feature_table
from frozenprefix.planning import costs
from frozenprefix.planning.calibration import black_image, time_encoding
from frozenprefix.planning.costs import StepShape
from frozenprefix.planning.hardware import HARDWARE, Hardware
from frozenprefix.planning.step_costs import StepCosts, step_costs
from frozenprefix.planning.workload import MachinePlan, Workload, count_steps
from frozenprefix.training.mixture import Mixture, without_cache
from frozenprefix.training.setup import images_of, load_parts, load_validation

LOOK_UP_SECONDS = 1e-6  # of an image whose features are looked up
SCALES = (1_000_000, 100_000_000)
_OF_STREAMS = ("stream", "shuffle_images", "weight")


@dataclass(frozen=True)
class Plan:
    """All figures of a plan, in bytes, seconds and operations.

    Attributes:
        memory: bytes in use at the peak of a step, by part.
        step: the mean step; flops, bytes: operations and bytes moved in it, by part.
        machines: by name, "here" first if it was measured.
        scale: cache and time for millions of images.

    Example:
        >>> plan(recipe, ["h100"], calibrate=0).to_dict()["images_per_step"]
        4
    """

    name: str
    parameters: dict[str, int]
    memory: dict[str, float]
    step: StepShape
    images_per_step: int
    flops: dict[str, float]
    bytes: dict[str, float]
    encoder_flops: float
    images: dict[str, int]
    cache_bytes_per_image: int
    cache_bytes: int
    machines: dict[str, MachinePlan]
    scale: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def stages(self, machine: str) -> list[tuple[str, float]]:
        """The stages of a run on a machine, in order, with the seconds of each.

        Example:
            >>> [stage for stage, _ in plan(recipe, ["h100"], calibrate=0).stages("h100")]  # doctest: +ELLIPSIS
            ['encode ... images', 'train 6 steps', 'validate meanwhile']
        """
        planned = self.machines[machine]
        training = planned.seconds_to_train - planned.seconds_to_validate
        return [
            (f"encode {self.images['all'] - self.images['cached']:,} images", planned.seconds_to_encode),
            (f"train {planned.steps:,} steps", training),
            ("validate meanwhile", planned.seconds_to_validate),
        ]


def plan(
    recipe: Recipe | ContrastiveRecipe,
    hardware: Sequence[str] = ("h100", "a100", "rtx4090", "cpu"),
    *,
    calibrate: float = 4.0,
    here: Hardware | None = None,
) -> Plan:
    """Compute the cost of a recipe.

    Shapes are counted on training batches that the run itself will see. If a mapper is all that is trained, only the
    encoder's weights are loaded, and for calibration those of the language model. For every other recipe the model is
    built, and its costs are counted on a real step.

    Args:
        hardware: names in `HARDWARE`.
        calibrate: seconds of real training steps for the time on this machine; 0 leaves this machine out.
        here: rates of this machine, by which "here" is then calculated; for `calibrate` 0.

    Raises:
        ConfigError: for a name that is not in the table.
        FrozenPrefixError: as training the recipe would.

    Example:
        >>> list(plan(recipe, ["h100"], calibrate=0).machines)
        ['h100']
    """
    machines = {name: HARDWARE.get(name) for name in hardware}
    recipe = resolve_precision(recipe)
    recipe, groups, train_images = _read_data(recipe)
    paths = _images_to_encode(recipe, groups)
    encoder = ImageEncoder.from_config(recipe.model.vision_encoder)
    tokens, dim = encoder.module.num_tokens, encoder.module.encoder_dim
    step = step_costs(recipe, groups, encoder, calibrate=calibrate)
    images = _image_costs(recipe, encoder, paths, calibrate / 2)
    # every view of a training image is encoded as an image of its own
    views = recipe.data.further_views
    training = images_of(groups["train"]) if views else []
    in_all = len(paths) + len(views) * len(training)
    cached = _count_cached(recipe, encoder, paths)
    cached += sum(_count_cached(recipe, replace(encoder, view=view), training) for view in views)
    workload = Workload.from_recipe(recipe, groups, in_all - cached)
    if step.encodes:
        workload = replace(workload, to_encode=0, cached=True)  # the time of a step holds that of its images
    planned: dict[str, MachinePlan] = {}
    if step.seconds is not None:
        seconds, validation = step.seconds
        planned["here"] = workload.on_machine("this machine", seconds, images.seconds, validation, None)
    elif here is not None:
        half = recipe.training.precision != "fp32"
        seconds = here.seconds(sum(step.flops.values()), sum(step.bytes.values()), half=half, layers=step.layers)
        per_image = seconds / recipe.training.images_per_step
        planned["here"] = workload.on_machine(here.label, seconds, images.seconds, per_image, None)
    half = recipe.training.precision != "fp32"
    planned |= {
        name: _on_machine(machine, workload, step, images, half=half, images_per_step=recipe.training.images_per_step)
        for name, machine in machines.items()
    }
    per_image = costs.cached_bytes(recipe.data.feature_dtype, tokens, dim)
    return Plan(
        name=recipe.name,
        parameters=step.parameters,
        memory=step.memory,
        step=step.step,
        images_per_step=recipe.training.images_per_step,
        flops=step.flops,
        bytes=step.bytes,
        encoder_flops=images.flops,
        images={
            "all": in_all,
            "cached": in_all - workload.to_encode,
            "train": train_images,
            "validation": len(groups.get("validation", [])),
        },
        cache_bytes_per_image=per_image,
        cache_bytes=costs.cache_size(recipe.data.feature_dtype, tokens, dim, [*paths, *len(views) * training]),
        machines=planned,
        scale=[_at_scale(count, per_image, recipe.training.images_per_step, planned) for count in SCALES],
    )


def _read_data(recipe: Any) -> tuple[Any, dict[str, list[ImageGroup]], int]:
    """The recipe, its images, and the number of those to train on.

    Of streams, the first images stand for all: the recipe is then that of a run with as many steps.
    """
    if not recipe.data.streamed:
        samples = load_parts(recipe.data)
        groups = {part: group_by_images(listed) for part, listed in samples.items()}
        return recipe, groups, len(groups["train"])
    mixture = Mixture.load(recipe.data)
    images = mixture.training_set(group_by_images(mixture.listed))
    listed = [{key: value for key, value in source.items() if key not in _OF_STREAMS} for source in recipe.data.train]
    data = without_cache(recipe.data, mixture.streams).model_copy(update={"train": listed})
    training = recipe.training.model_copy(update={"max_steps": count_steps(recipe, len(images)), "epochs": None})
    groups = {"train": images.to_check()}
    if recipe.data.validation:
        groups["validation"] = group_by_images(load_validation(recipe.data))
    return recipe.model_copy(update={"data": data, "training": training}), groups, len(images)


def _images_to_encode(recipe: Recipe | ContrastiveRecipe, groups: dict[str, list[ImageGroup]]) -> list[Path]:
    """Image files of all parts; training on text alone reads none of its own."""
    unread = ("train",) if isinstance(recipe, Recipe) and recipe.data.text_only is not None else ()
    paths = images_of(group for part, listed in groups.items() if part not in unread for group in listed)
    return [path for path in paths if path.suffix != ".npy"]  # features of shards need no encoding


@dataclass(frozen=True)
class ImageCosts:
    """Cost of encoding an image: operations, bytes moved, seconds here, and seconds of one core to decode it."""

    flops: float
    bytes: float
    seconds: float
    decode_seconds: float


def _image_costs(
    recipe: Recipe | ContrastiveRecipe, encoder: ImageEncoder, paths: Sequence[Path], seconds: float
) -> ImageCosts:
    if feature_table(encoder.module) is not None or not paths:
        return ImageCosts(0.0, 0.0, LOOK_UP_SECONDS, 0.0)
    flops, moved = costs.encoder_cost(encoder.module, black_image(encoder))
    measured = time_encoding(encoder, paths if seconds else paths[:8], recipe.data, seconds)
    return ImageCosts(flops, moved, 1 / measured.images_per_second, measured.decode_seconds)


def _on_machine(
    machine: Hardware, workload: Workload, step: StepCosts, images: ImageCosts, *, half: bool, images_per_step: int
) -> MachinePlan:
    """The plan for a machine of the table."""
    seconds = machine.seconds(sum(step.flops.values()), sum(step.bytes.values()), half=half, layers=step.layers)
    encode = machine.encode_seconds(images.flops, images.bytes, images.decode_seconds, half=half)
    encode = max(encode, LOOK_UP_SECONDS)
    # no backward pass, but two forward passes: about as much as training on the image
    validation = seconds / images_per_step
    needed = sum(step.memory.values()) - (step.memory[costs.PREPACKED_COPIES] if machine.kind == "gpu" else 0)
    fits = None if machine.memory is None else needed < 0.9 * machine.memory
    return workload.on_machine(machine.label, seconds, encode, validation, fits)


def _at_scale(images: int, per_image: int, images_per_step: int, machines: dict[str, MachinePlan]) -> dict[str, Any]:
    """What that many images cost to cache and to train on once."""
    return {
        "images": images,
        "cache_bytes": images * per_image,
        "machines": {
            name: {
                "encode_hours": images / machine.encode_per_second / 3600,
                "epoch_hours": images / images_per_step * machine.seconds_per_step / 3600,
            }
            for name, machine in machines.items()
        },
    }


def _count_cached(recipe: Recipe | ContrastiveRecipe, encoder: ImageEncoder, paths: Sequence[Path]) -> int:
    """Images whose features are cached, as far as is known without reading them."""
    if recipe.data.feature_cache == "off" or feature_table(encoder.module) is not None:
        return 0
    folder = feature_folder(recipe.data.feature_storage, encoder.fingerprint)
    if not (folder / MANIFEST).exists():
        return 0
    cache, keys = FeatureCache.open(folder, encoder.fingerprint), ImageKeys(folder)
    return sum(keys.lookup(path) in cache for path in paths)
