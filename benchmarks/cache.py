"""Images per second with `frozenprefix cache` and with the encoder alone; training steps with and without the cache.

python benchmarks/cache.py [--quick] [--json report.json]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.plan_check import small_llama
from benchmarks.recipes import LITE0, SMOLLM2, make_recipe, photos, save_random_lm, synthetic_photos
from frozenprefix.config import Recipe
from frozenprefix.data import load_image
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.training import Trainer, fill_cache
from frozenprefix.training.setup import load_parts


def make(folder: Path, quick: bool) -> tuple[Recipe, str]:
    """A small Flickr8k recipe, or a tiny one, and a description of its images."""
    training = {"max_steps": 100, "targets_per_image": 4, "images_per_step": 12}
    if quick:
        model = {
            "vision_encoder": {"source": "timm", "name": "test_vit", "weights": "random", "image_size": 32},
            "mapper": {"type": "mlp", "prefix_length": 4},
            "language_model": {"path": str(save_random_lm(folder / "lm", small_llama(48, 2)))},
        }
        source, name = synthetic_photos(folder / "photos", 48, (64, 64)), "synthetic images of 64 x 64"
        return make_recipe(folder, "cache", source, model=model, training=training), name
    source, name = photos(folder / "photos", 320)
    model = {
        "vision_encoder": {
            "source": "timm", "name": "tf_efficientnet_lite0", "weights": LITE0, "output": "pooled", "resize": "squash",
        },
        "mapper": {"type": "mlp", "prefix_length": 10, "hidden_dim": 1024, "input_norm": True},
        "language_model": {"path": SMOLLM2},
    }  # fmt: skip
    return make_recipe(folder, "cache", source, model=model, training={**training, "precision": "bf16"}), name


def encoding(recipe: Recipe, folder: Path, rounds: int) -> dict[str, Any]:
    """Rates of the encoder alone on prepared pixels, of decoding on one core, and of the whole command."""
    encoder = ImageEncoder.from_config(recipe.model.vision_encoder)
    paths = [path for sample in load_parts(recipe.data)["train"] for path in sample.images]
    before = time.perf_counter()
    pixels = encoder.pixel_values([load_image(path) for path in paths[: encoder.batch_size]])
    decoding = len(pixels) / (time.perf_counter() - before)
    batches = len(paths) // encoder.batch_size
    bare, command = [], []

    def encode_all() -> None:
        for _ in range(batches):
            encoder.encode(pixels)

    encode_all()
    for number in range(rounds):  # in turns, so that a slow minute affects both
        before = time.perf_counter()
        encode_all()
        bare.append(batches * len(pixels) / (time.perf_counter() - before))
        data = recipe.data.model_copy(update={"feature_cache": str(folder / f"round-{number}")})
        filled = fill_cache(recipe.model_copy(update={"data": data}))
        command.append(filled.encoded / filled.seconds)
    again = fill_cache(recipe.model_copy(update={"data": data}))
    return {
        "images": len(paths),
        "bare_encoder_per_s": statistics.median(bare),
        "decode_per_s_per_core": decoding,
        "cache_per_s": statistics.median(command),
        "share_of_bare_encoder": statistics.median(c / b for c, b in zip(command, bare, strict=True)),
        "cached_already_per_s": len(paths) / again.seconds,
        "bytes_per_image": filled.bytes / filled.features,
    }


class Steps(Trainer):
    """One training step per call."""

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.setup()
        self.model.train()
        self.stream_of_batches = self.batches()

    def __call__(self) -> None:
        self.step(self.stream_of_batches)


def training(recipe: Recipe, folder: Path, rounds: int) -> dict[str, Any]:
    """Targets per second of the same steps, in turns from the cache and from image files.

    The training process reads the images itself: workers would prepare them while the other arm is timed.
    """
    arms = {}
    for name, cache in (("with_cache", str(folder / "round-0")), ("without_cache", "off")):
        data = recipe.data.model_copy(update={"feature_cache": cache, "workers": 0})
        arms[name] = Steps(recipe.model_copy(update={"data": data}))
    seconds = common.timed_rounds(arms, rounds, warmup=min(2, rounds))
    targets = (recipe.training.targets_per_image or 0) * recipe.training.images_per_step
    report = {f"{name}_targets_per_s": targets / statistics.median(times) for name, times in seconds.items()}
    return {**report, "speed_up": common.median_ratio(seconds["without_cache"], seconds["with_cache"])}


def main() -> None:
    arguments = common.parser(__doc__).parse_args()
    common.start_logging()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe, images = make(folder, arguments.quick)
        rates = encoding(recipe, folder, 1 if arguments.quick else 3)
        steps = training(recipe, folder, 1 if arguments.quick else 12)
    rows = [
        ["encoder alone, on prepared pixels", "images/s", rates["bare_encoder_per_s"]],
        ["decoding and resizing, one core", "images/s", rates["decode_per_s_per_core"]],
        ["`frozenprefix cache`, from files to shards", "images/s", rates["cache_per_s"]],
        ["share of the encoder alone", "", rates["share_of_bare_encoder"]],
        ["images already in the cache", "images/s", rates["cached_already_per_s"]],
        ["training with the cache", "targets/s", steps["with_cache_targets_per_s"]],
        ["training from image files", "targets/s", steps["without_cache_targets_per_s"]],
        ["speed-up by the cache", "", steps["speed_up"]],
    ]
    report = {"benchmark": "cache", "data": images, **rates, **steps}
    title = f"EfficientNet-Lite0 at 224 pixels in bf16, {rates['images']} {images}; SmolLM2-135M in training.\n\n"
    common.finish(report, arguments, "cache", title + common.table(["", "", ""], rows))


if __name__ == "__main__":
    main()
