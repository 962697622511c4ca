"""The predictions of `frozenprefix plan` divided by measurements, for three small recipes.

python benchmarks/plan_check.py [--quick] [--json report.json] [--only NAME]
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import GPT2Config, LlamaConfig

from benchmarks import common
from benchmarks.recipes import LITE0, SMOLLM2, make_recipe, photos, save_random_lm, synthetic_photos
from frozenprefix.config import Recipe, load_recipe
from frozenprefix.models import count_parameters
from frozenprefix.planning import plan
from frozenprefix.training import Trainer, fill_cache

STEPS = 20
TOLERANCE = 0.25
COLUMNS = {
    "seconds_per_step": "s/step",
    "seconds_to_train": "whole run",
    "encode_per_second": "images/s to encode",
    "cache_bytes": "cache size",
    "memory": "memory",
    "trainable": "trainable parameters",
}


class TimedTrainer(Trainer):
    """Records the duration of every step."""

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.step_seconds: list[float] = []

    def step(self, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
        before = time.perf_counter()
        values = super().step(batches)
        self.step_seconds.append(time.perf_counter() - before)
        return values


def quick_recipes(folder: Path) -> Iterator[Recipe]:
    """One tiny recipe."""
    lm = save_random_lm(folder / "lm", small_llama(48, 2))
    yield make_recipe(
        folder,
        "tiny",
        synthetic_photos(folder / "photos", 24, (64, 64)),
        model={
            "vision_encoder": {"source": "timm", "name": "test_vit", "weights": "random", "image_size": 32},
            "mapper": {"type": "mlp", "prefix_length": 4},
            "language_model": {"path": str(lm)},
        },
        training={"max_steps": 6, "images_per_step": 4},
    )


def recipes(folder: Path) -> Iterator[Recipe]:
    """A small Flickr8k recipe; patch features, transformer mapper and random GPT-2; a Perceiver and random LLaMA."""
    source, _ = photos(folder / "photos", 300)
    lite0 = {"source": "timm", "name": "tf_efficientnet_lite0", "weights": LITE0}
    validation = {"validation": [{**source, "limit": 24}]}
    yield make_recipe(
        folder,
        "smollm2-mlp",
        source,
        model={
            "vision_encoder": {**lite0, "output": "pooled", "resize": "squash"},
            "mapper": {"type": "mlp", "prefix_length": 10, "hidden_dim": 1024, "input_norm": True},
            "language_model": {"path": SMOLLM2},
        },
        data=validation,
        training={"max_steps": STEPS, "precision": "bf16"},
    )
    gpt2 = GPT2Config(
        vocab_size=20_000, n_embd=512, n_layer=6, n_head=8, n_positions=512, bos_token_id=1, eos_token_id=2
    )
    yield make_recipe(
        folder,
        "gpt2-transformer",
        source,
        model={
            "vision_encoder": {**lite0, "image_size": 160},
            "mapper": {"type": "transformer", "prefix_length": 10, "num_layers": 4},
            "language_model": {"path": str(save_random_lm(folder / "gpt2", gpt2))},
        },
        data=validation,
        training={"max_steps": STEPS, "packing": "flat", "gradient_accumulation_steps": 2},
    )
    yield make_recipe(
        folder,
        "llama-perceiver",
        source,
        model={
            "vision_encoder": {**lite0, "image_size": 160, "layer": -2},
            "mapper": {"type": "perceiver", "prefix_length": 16, "num_layers": 2},
            "language_model": {"path": str(save_random_lm(folder / "llama", small_llama(384, 8, 20_000)))},
        },
        data={**validation, "feature_dtype": "int8"},
        training={"max_steps": STEPS, "images_per_step": 8, "targets_per_image": None, "packing": "none"},
    )


def small_llama(hidden: int, layers: int, vocabulary: int = 500) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=6, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip


def check(recipe: Recipe, calibrate: float) -> dict[str, Any]:
    """Plan the recipe, then fill its cache and train it: predictions, measurements and their ratios."""
    before = time.perf_counter()
    predicted = plan(recipe, [], calibrate=calibrate)
    planning = time.perf_counter() - before
    here = predicted.machines["here"]
    gc.collect()
    filled = fill_cache(recipe)
    trainer = TimedTrainer(recipe)
    result = trainer.run("never")
    values = {
        "seconds_per_step": (here.seconds_per_step, sum(trainer.step_seconds) / len(trainer.step_seconds)),
        "seconds_to_train": (here.seconds_to_train, result.seconds),
        "encode_per_second": (here.encode_per_second, filled.encoded / filled.seconds),
        "cache_bytes": (predicted.cache_bytes, filled.bytes),
        "memory": (sum(predicted.memory.values()) / 2**20, memory_in_own_process(recipe)),
        "trainable": (predicted.parameters["trainable"], count_parameters(trainer.model).trainable),
    }
    return {
        "planning_seconds": planning,
        "predicted": {name: pair[0] for name, pair in values.items()},
        "measured": {name: pair[1] for name, pair in values.items()},
        "ratio": {name: pair[0] / pair[1] for name, pair in values.items()},
    }


def memory_in_own_process(recipe: Recipe) -> float:
    """MiB that training needs beyond a tiny run, measured in its own process."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(recipe.model_copy(update={"output_dir": Path(file.name).with_suffix("")}).to_yaml())
        file.flush()
        command = [sys.executable, __file__, "--memory-of", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def memory_of(recipe: Recipe) -> float:
    with tempfile.TemporaryDirectory() as folder:
        for tiny in quick_recipes(Path(folder)):  # loads everything that is loaded at first use
            Trainer(tiny).run("never")
    libraries = common.peak_rss_mib()
    Trainer(recipe).run("never")
    return common.peak_rss_mib() - libraries


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--only", help="name of one recipe")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        short = ["training.max_steps=4", "data.validation=[]"]
        sys.stdout.write(f"{memory_of(load_recipe(arguments.memory_of, short))}\n")
        return
    common.start_logging()
    checks: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for recipe in quick_recipes(Path(folder)) if arguments.quick else recipes(Path(folder)):
            if arguments.only in (None, recipe.name):
                checks[recipe.name] = check(recipe, 0.2 if arguments.quick else 5.0)
    ratios = [value for one in checks.values() for value in one["ratio"].values()]
    report = {
        "benchmark": "plan_check",
        "recipes": checks,
        "steps": STEPS,
        "largest_error": max(abs(ratio - 1) for ratio in ratios),
        "within_25_percent": all(abs(ratio - 1) <= TOLERANCE for ratio in ratios),
    }
    arguments.quick |= arguments.only is not None  # the README's table needs all recipes
    rows = [[name, *(one["ratio"][column] for column in COLUMNS)] for name, one in checks.items()]
    common.finish(report, arguments, "plan_check", common.table(["recipe", *COLUMNS.values()], rows))


if __name__ == "__main__":
    main()
