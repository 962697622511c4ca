"""All published methods on the same photos, with the same frozen parts and the same number of targets.

    python benchmarks/methods.py [--quick] [--json report.json] [--only limber,flamingo] [--targets 3840]
        [--resume part.json]

Each method is a recipe in `recipes/`. It is trained in its own process on the same number of captions, and then
captions validation photos: with the right images, with shuffled ones, and with none. `--resume` keeps each result as
soon as it is measured, and later runs skip the methods that it holds.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.recipes import photos, small_parts
from frozenprefix.config import Recipe, load_recipe
from frozenprefix.data import load_source
from frozenprefix.evaluation import evaluate_samples, text_ability
from frozenprefix.inference import Captioner
from frozenprefix.models import count_parameters
from frozenprefix.training import Trainer, read_log

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# recipe -> its name in the table
METHODS = {
    "clipcap_mlp": "ClipCap, MLP",
    "clipcap_transformer": "ClipCap, transformer",
    "limber": "LiMBeR (linear)",
    "frozen": "Frozen (encoder trained)",
    "mapl": "MAPL",
    "magma": "MAGMA (adapters)",
    "flamingo": "Flamingo (gated cross-attention)",
    "blip2": "BLIP-2 (Q-Former)",
    "llava": "LLaVA (MLP per patch)",
    "fromage": "FROMAGe (linear, contrastive)",
    "deep_prefix": "deep prefix",
    "residual": "gated residual",
    "lora": "MLP and LoRA",
    "adalora": "MLP and AdaLoRA",
    "prefix_tuning": "MLP and prefix tuning",
    "mlp": "this toolkit's own MLP",
}
TEXT = " ".join(pydoc_data.topics.topics[topic] for topic in ("class", "import", "exceptions"))
VALIDATION_IMAGES, CAPTIONED = 64, 200


def recipe_of(name: str, folder: Path, targets: int, quick: bool) -> Recipe:
    """The recipe with another length, data folder and output folder; `quick` also replaces its models by tiny ones."""
    path = RECIPES / f"{name}.yaml"
    settings = load_recipe(path).training
    steps = math.ceil(targets / settings.images_per_step / (settings.targets_per_image or 1))
    length = [
        "training.epochs=null",
        "training.max_minutes=null",
        f"training.max_steps={steps}",
        f"training.warmup_steps={steps // 10}",
        f"training.log_every={max(1, steps // 8)}",
        f"training.validate_every={steps}",
        f"training.save_every={steps}",
        f"training.validation_images={VALIDATION_IMAGES}",
        f"output_dir={folder / 'run'}",
    ]
    if name == "adalora":  # its rank schedule depends on the length of the run
        length += [f"model.language_model.peft.{key}={steps // part}" for key, part in (("tinit", 10), ("tfinal", 5))]
        length.append(f"model.language_model.peft.deltaT={max(1, steps // 150)}")
    if quick:
        return load_recipe(path, [*small_parts(path, folder), *length])
    source, _ = photos(folder / "photos", 6000)
    validation = {**source, "split": "val", "limit": CAPTIONED}
    del source["limit"]
    data = [f"data.train=[{json.dumps(source)}]", f"data.validation=[{json.dumps(validation)}]"]
    return load_recipe(path, [*data, *length])


def measure(name: str, targets: int, quick: bool) -> dict[str, Any]:
    """Train one method and evaluate its captions, in its own process: the peak memory is that of the process."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = recipe_of(name, folder, targets, quick)
        trainer = Trainer(recipe)
        result = trainer.run("never")
        lines = read_log(result.output_dir)
        losses = next(line for line in reversed(lines) if "validation/loss" in line)
        memory = common.peak_rss_mib()
        tokenizer = trainer.processor.tokenizer
        before = text_ability(trainer.model, tokenizer, TEXT, adapted=False)
        after = text_ability(trainer.model, tokenizer, TEXT)
        samples = [sample for source in recipe.data.validation for sample in load_source(source)]
        scores = evaluate_samples(
            Captioner(trainer.model, trainer.processor), samples, predictions=folder / "captions.jsonl", num_beams=1
        )
        return {
            "trainable": count_parameters(trainer.model).trainable,
            "targets": result.targets_seen,
            "targets_per_s": statistics.median(line["targets_per_s"] for line in lines if "targets_per_s" in line),
            "peak_rss_mib": memory,
            "validation_loss": losses["validation/loss"],
            "shuffled_loss": losses["validation/shuffled_loss"],
            "metrics": scores["metrics"],
            "baselines": scores["baselines"],
            "perplexity": [before.perplexity, after.perplexity],
            "text_is_unchanged": before.logits_sha256 == after.logits_sha256,
        }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the methods that `--resume` does not hold yet, one process per method."""
    report: dict[str, Any] = {"targets": arguments.targets, "methods": {}}
    if arguments.resume and arguments.resume.is_file():
        earlier = json.loads(arguments.resume.read_text())
        if earlier.get("targets") == arguments.targets:
            report["methods"] = earlier["methods"]
    for name in arguments.only.split(",") if arguments.only else METHODS:
        if name in report["methods"]:
            continue
        command = [sys.executable, __file__, "--measure", name, "--targets", str(arguments.targets)]
        done = subprocess.run(command + ["--quick"] * arguments.quick, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed; its output is above")
        report["methods"][name] = json.loads(done.stdout.splitlines()[-1])
        if arguments.resume:
            arguments.resume.write_text(json.dumps(report, indent=2) + "\n")
    return report


def markdown(report: dict[str, Any]) -> str:
    rows = []
    for name, result in sorted(report["methods"].items(), key=lambda item: item[1]["validation_loss"]):
        before, after = result["perplexity"]
        rows.append(
            [
                f"[{METHODS[name]}](../recipes/{name}.yaml)",
                f"{result['trainable'] / 1e6:.1f} M",
                result["targets_per_s"],
                f"{result['peak_rss_mib'] / 1024:.1f}",
                f"{result['validation_loss']:.3f}",
                f"{result['shuffled_loss']:.3f}",
                f"{result['metrics']['cider_d']:.3f}",
                f"{result['baselines']['shuffled']['cider_d']:.3f}",
                f"{result['baselines']['blind']['cider_d']:.3f}",
                "0 (same bits)" if result["text_is_unchanged"] else f"{100 * (after / before - 1):+.1f} %",
            ]
        )
    header = [
        "method", "trained", "targets/s", "GiB", "loss", "shuffled", "CIDEr-D", "shuffled", "blind", "text perplexity",
    ]  # fmt: skip
    return common.table(header, rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__)
    parser.add_argument("--only", help="names of recipes, separated by commas")
    parser.add_argument("--targets", type=int, help="training captions per method; 3840, or 96 with --quick")
    parser.add_argument("--resume", type=Path, help="file that keeps the results of each method")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.targets = arguments.targets or (96 if arguments.quick else 3840)
    common.start_logging()
    if arguments.measure:
        report = measure(arguments.measure, arguments.targets, arguments.quick)
        sys.stdout.write(json.dumps(report) + "\n")
        return report
    report = run(arguments)
    common.finish(report, arguments, "methods", markdown(report))
    return report


if __name__ == "__main__":
    main()
