"""The predictions of `frozenprefix plan` divided by measurements, for nine small recipes.

Three have the plain parts; the others train LoRA, cross-attention, an encoder-decoder model, the vision encoder, by
self-critical training, and contrastively.

python benchmarks/plan_check.py [--quick] [--json report.json] [--only NAME]
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import GPT2Config, LlamaConfig, T5Config

from benchmarks import common
from benchmarks.recipes import LITE0, SMOLLM2, make_recipe, photos, save_random_lm, synthetic_photos
from frozenprefix.config import ContrastiveRecipe, Recipe, load_recipe, recipe_from_dict
from frozenprefix.models import count_parameters
from frozenprefix.planning import plan
from frozenprefix.training import BaseTrainer, Trainer, fill_cache
from frozenprefix.training.contrastive import ContrastiveTrainer

ROOT = Path(__file__).resolve().parents[1]
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


def timed_trainer(recipe: Recipe | ContrastiveRecipe) -> tuple[BaseTrainer, list[float]]:
    """The recipe's trainer, and the durations of its steps, a list that grows while it runs."""
    trainer = (ContrastiveTrainer if recipe.kind == "contrastive" else Trainer)(recipe)
    seconds: list[float] = []
    own_step = trainer.step

    def step(batches: Iterator[Any]) -> dict[str, float]:
        before = time.perf_counter()
        values = own_step(batches)
        seconds.append(time.perf_counter() - before)
        return values

    trainer.step = step  # type: ignore[method-assign]
    return trainer, seconds


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

    yield from further_recipes(folder, source, validation)


def further_recipes(folder: Path, source: dict[str, Any], validation: dict[str, Any]) -> Iterator[Any]:
    """LoRA, cross-attention, T5, a trained encoder, self-critical training, and the contrastive kind."""
    encoder = {"source": "timm", "name": "tf_efficientnet_lite0", "weights": LITE0, "image_size": 160}
    llama = {"path": str(save_random_lm(folder / "llama-lm", small_llama(384, 8, 20_000)))}
    mapper = {"type": "mlp", "prefix_length": 8}
    plain = {"vision_encoder": {**encoder, "output": "pooled"}, "mapper": mapper, "language_model": llama}
    lora = {"type": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    small_vit = {"source": "timm", "name": "vit_tiny_patch16_224", "weights": "random", "trainable": "all"}
    t5 = T5Config(
        vocab_size=20_000, d_model=384, d_kv=64, d_ff=1024, num_layers=4, num_heads=6, decoder_start_token_id=0,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    cases: dict[str, dict[str, Any]] = {
        "lora": {"model": {**plain, "language_model": {**llama, "peft": lora}}},
        "cross-attention": {
            "model": {
                **plain,
                "vision_encoder": encoder,
                "mapper": {"type": "perceiver", "prefix_length": 16, "num_layers": 2},
                "fusion": {"type": "cross_attention", "every": 4},
            }
        },
        "t5": {
            "model": {**plain, "language_model": {"path": str(save_random_lm(folder / "t5", t5))}},
            "training": {"packing": "none"},
        },
        "trained-encoder": {
            "model": {**plain, "vision_encoder": {**small_vit, "output": "pooled"}},
            "data": {"feature_cache": "off"},
        },
        "self-critical": {
            "model": plain,
            "objectives": {"lm": 0.0, "self_critical": {"samples": 4, "max_new_tokens": 12}},
            "training": {"targets_per_image": 1, "images_per_step": 6},
        },
    }
    for name, case in cases.items():
        training = {"max_steps": STEPS, "images_per_step": 8, **case.get("training", {})}
        data = {**validation, **case.get("data", {})}
        recipe = make_recipe(folder, name, source, model=case["model"], data=data, training=training)
        changes = [f"objectives={json.dumps(case['objectives'])}"] if "objectives" in case else []
        yield recipe_from_dict(recipe.model_dump(mode="json", exclude_unset=True), changes) if changes else recipe
    yield load_recipe(
        ROOT / "recipes" / "lit_flickr8k.yaml",
        [
            f"data.train={json.dumps([source])}",
            f"data.validation={json.dumps(validation['validation'])}",
            f"data.feature_cache={folder / 'contrastive-features'}",
            f"output_dir={folder / 'contrastive'}",
            "name=contrastive",
            "training.epochs=null",
            f"training.max_steps={STEPS}",
            "training.images_per_step=64",
            "training.precision=fp32",
            "training.log_every=1000000",
            "training.save_every=1000000",
        ],
    )


def small_llama(hidden: int, layers: int, vocabulary: int = 500) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=6, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip


def check(recipe: Recipe | ContrastiveRecipe, calibrate: float) -> dict[str, Any]:
    """Plan the recipe, then fill its cache and train it: predictions, measurements and their ratios."""
    before = time.perf_counter()
    predicted = plan(recipe, [], calibrate=calibrate)
    planning = time.perf_counter() - before
    here = predicted.machines["here"]
    gc.collect()
    cached: dict[str, tuple[float, float]] = {}
    if recipe.data.feature_cache != "off":
        filled = fill_cache(recipe)
        cached["encode_per_second"] = here.encode_per_second, filled.encoded / filled.seconds
        cached["cache_bytes"] = predicted.cache_bytes, filled.bytes
    trainer, seconds = timed_trainer(recipe)
    result = trainer.run("never")
    values = {
        "seconds_per_step": (here.seconds_per_step, sum(seconds) / len(seconds)),
        "seconds_to_train": (here.seconds_to_train, result.seconds),
        **cached,
        "memory": (sum(predicted.memory.values()) / 2**20, memory_in_own_process(recipe)),
        "trainable": (predicted.parameters["trainable"], count_parameters(trainer.model).trainable),
    }
    return {
        "planning_seconds": planning,
        "predicted": {name: pair[0] for name, pair in values.items()},
        "measured": {name: pair[1] for name, pair in values.items()},
        "ratio": {name: pair[0] / pair[1] for name, pair in values.items()},
    }


def memory_in_own_process(recipe: Recipe | ContrastiveRecipe) -> float:
    """MiB that training needs beyond a tiny run, measured in its own process."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(recipe.model_copy(update={"output_dir": Path(file.name).with_suffix("")}).to_yaml())
        file.flush()
        command = [sys.executable, __file__, "--memory-of", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def memory_of(recipe: Recipe | ContrastiveRecipe) -> float:
    with tempfile.TemporaryDirectory() as folder:
        for tiny in quick_recipes(Path(folder)):  # loads everything that is loaded at first use
            Trainer(tiny).run("never")
    libraries = common.peak_rss_mib()
    timed_trainer(recipe)[0].run("never")
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
    rows = [[name, *(one["ratio"].get(column, "–") for column in COLUMNS)] for name, one in checks.items()]
    common.finish(report, arguments, "plan_check", common.table(["recipe", *COLUMNS.values()], rows))


if __name__ == "__main__":
    main()
