"""How much a recipe gains from its images: it is compared with a twin trained on one constant vector for all images.

python benchmarks/blind_twin.py RECIPE [KEY=VALUE ...] --task vqa [--option answering=choose] [--json report.json]

Both are trained, in the recipe's output_dir and beside it, unless they are already. Both are evaluated on the recipe's
validation data and compared by paired bootstrap over images.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from frozenprefix.config import Recipe, load_recipe, read_yaml
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.data.sources import load_sources
from frozenprefix.evaluation import Evaluation, compare, evaluate_checkpoint
from frozenprefix.training import train


def blind_recipe(path: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe with one constant feature for all images, in a folder beside the recipe's own.

    `training.init_from` is removed, because that checkpoint was trained on images.
    """
    recipe = load_recipe(path, overrides)
    folder = recipe.output_dir.with_name(f"{recipe.output_dir.name}_blind")
    table = folder / "constant.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    encoder = ImageEncoder.from_config(recipe.model.vision_encoder).module
    feature = torch.ones(encoder.num_tokens, encoder.encoder_dim)
    images = {p for s in load_sources([*recipe.data.train, *recipe.data.validation]) for p in s.images}
    save_file({"/".join(image.absolute().parts[1:]): feature.clone() for image in images}, table)
    changes = {
        "output_dir": str(folder),
        "model.vision_encoder": {"source": "features", "path": str(table)},
        "training.init_from": None,
    }
    return load_recipe(path, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in changes.items())])


def evaluated(recipe: Recipe, task: str, options: dict[str, Any]) -> Evaluation:
    """Train the recipe unless it is complete, and evaluate its last checkpoint on its validation data."""
    trained = train(recipe)
    result = evaluate_checkpoint(trained.output_dir / "last", task=task, **options)
    file = trained.output_dir / f"{task}_scores.json"
    file.write_text(json.dumps(result, indent=2))
    return Evaluation.load(file)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    options = {name: read_yaml(value, name) for name, _, value in (text.partition("=") for text in arguments.option)}
    recipes = load_recipe(arguments.recipe, arguments.overrides), blind_recipe(arguments.recipe, arguments.overrides)
    seeing, blind = (evaluated(recipe, arguments.task, options) for recipe in recipes)
    return {
        "recipe": arguments.recipe.stem,
        "settings": seeing.result["settings"],
        "n": seeing.result["n"],
        "metrics": seeing.result["metrics"],
        "intervals": seeing.result["intervals"],
        "shuffled": seeing.result["baselines"]["shuffled"],
        "blind_twin": blind.result["metrics"],
        "difference": compare(blind, seeing)["metrics"],
    }


def between(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.3f}" if low is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def markdown(report: dict[str, Any]) -> str:
    rows = []
    for name, value in report["metrics"].items():
        difference = report["difference"][name]
        own = between(value, *report["intervals"].get(name, (None, None)))
        gain = between(difference["difference"], difference["low"], difference["high"])
        rows.append([name, own, report["blind_twin"][name], gain, report["shuffled"].get(name, "–")])
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    head = ["", "trained on images (95 %)", "blind twin", "difference (95 %)", "shuffled images"]
    return f"`{report['recipe']}`, {report['n']} samples, {settings}.\n\n{common.table(head, rows)}"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as in `frozenprefix train`")
    parser.add_argument("--task", choices=["vqa", "caption"], default="vqa")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the evaluation task"
    )
    arguments = parser.parse_intermixed_args(argv)
    return common.publish(run, arguments, "blind-twin", markdown)


if __name__ == "__main__":
    main()
