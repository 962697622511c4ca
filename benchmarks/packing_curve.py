"""One recipe trained with and without packing: same steps, same seed, loss curves and times compared.

python benchmarks/packing_curve.py [--quick] [--json report.json] [--recipe recipes/mlp.yaml] [--steps 80]
    [training.KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import LlamaConfig

from benchmarks import common
from benchmarks.recipes import make_recipe, photos, save_random_lm, synthetic_photos
from frozenprefix.config import Recipe, load_recipe
from frozenprefix.training import train

ARMS = ("trie", "none")
VALIDATIONS = 5


def quick_recipe(folder: Path, packing: str) -> Recipe:
    config = LlamaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    source = synthetic_photos(folder / "photos", 12, (64, 64))
    return make_recipe(
        folder,
        packing,
        source,
        model={
            "vision_encoder": {"source": "timm", "name": "test_vit", "weights": "random", "image_size": 32},
            "mapper": {"type": "mlp", "prefix_length": 4},
            "language_model": {"path": str(save_random_lm(folder / "lm", config))},
        },
        data={"validation": [source]},
        training={"max_steps": 5, "images_per_step": 4, "validate_every": 1, "log_every": 1, "packing": packing},
    )


def full_recipe(folder: Path, packing: str, path: Path, steps: int, overrides: list[str]) -> Recipe:
    """The recipe with its own warm-up, but another length, output folder and data (see `photos`)."""
    source, _ = photos(folder / "photos", 6000)
    validation = {**source, "split": "val" if source["path"] != str(folder / "photos") else "train", "limit": 48}
    source.pop("limit", None)
    warmup = load_recipe(path).training.warmup_steps
    return load_recipe(
        path,
        [
            f"data.train=[{json.dumps(source)}]",
            f"data.validation=[{json.dumps(validation)}]",
            f"output_dir={folder / packing}",
            "training.epochs=null",
            "training.max_minutes=null",
            f"training.max_steps={steps}",
            f"training.warmup_steps={warmup}",
            f"training.validate_every={max(1, steps // VALIDATIONS)}",
            "training.log_every=1",
            f"training.packing={packing}",
            *overrides,
        ],
    )


def measure(recipe: Recipe) -> dict[str, Any]:
    result = train(recipe, resume="never")
    lines = [json.loads(line) for line in (result.output_dir / "log.jsonl").read_text().splitlines()]
    return {
        "seconds": result.seconds,
        "training_loss": [line["loss"] for line in lines if "loss" in line],
        "validation_loss": {line["step"]: line["validation/loss"] for line in lines if "validation/loss" in line},
    }


def compare(arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Largest differences between the curves, and the ratio of the times."""
    trie, none = (arms[arm] for arm in ARMS)
    validation = [abs(value - none["validation_loss"][step]) for step, value in trie["validation_loss"].items()]
    training = [abs(a - b) for a, b in zip(trie["training_loss"], none["training_loss"], strict=True)]
    return {
        "max_validation_difference": max(validation),
        "max_training_difference": max(training),
        "time_ratio": trie["seconds"] / none["seconds"],
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    arms: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for packing in ARMS:
            root = Path(folder)
            if arguments.quick:
                recipe = quick_recipe(root, packing)
            else:
                recipe = full_recipe(root, packing, arguments.recipe, arguments.steps, arguments.overrides)
            arms[packing] = measure(recipe)
    return {"steps": len(arms["trie"]["training_loss"]), "arms": arms, **compare(arms)}


def markdown(report: dict[str, Any]) -> str:
    arms = report["arms"]
    rows = [[step, *(arms[arm]["validation_loss"][step] for arm in ARMS)] for step in arms["trie"]["validation_loss"]]
    rows.append(["seconds", *(arms[arm]["seconds"] for arm in ARMS)])
    text = common.table(["validation loss at step", "packed", "plain batches"], rows)
    return (
        f"{text}\nLargest difference of the validation loss {report['max_validation_difference']:.2g} (target ≤ 0.01), "
        f"of a step's training loss {report['max_training_difference']:.2g}; packing takes {report['time_ratio']:.2f} "
        "of the time (target ≤ 0.33), validation included.\n"
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__)
    parser.add_argument("--recipe", type=Path, default=Path(__file__).parents[1] / "recipes" / "mlp.yaml")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as in `frozenprefix train`")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.quick and arguments.overrides:
        parser.error("--quick has its own recipe and takes no KEY=VALUE")
    # the README has two tables: the recipe unchanged, and a run that continues from a trained mapper
    keys = sorted(override.split("=")[0] for override in arguments.overrides)
    sections = {(): "packing_curve", ("training.init_from", "training.precision"): "packing_curve-continued"}
    return common.publish(run, arguments, sections.get(tuple(keys)), markdown)


if __name__ == "__main__":
    main()
