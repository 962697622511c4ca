"""Greedy captions with the language model in llama.cpp, beside this package: the same texts, and images per second.

    python benchmarks/llama_cpp.py --checkpoint runs/mlp/best --images data/flickr8k/images [--photos 100]
    python benchmarks/llama_cpp.py --quick

Encoder and mapper run here for all arms. The language model of the checkpoint is a GGUF file. llama.cpp
reads that file, whose quantized products round the activations too, and a file with the same weights in float32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.workloads import PREFIX, features_of, our_model, shapes
from frozenprefix.data.images import find_images
from frozenprefix.errors import ConfigError
from frozenprefix.export.gguf_language_model import write_language_model
from frozenprefix.export.verify import first_difference
from frozenprefix.inference import Captioner
from frozenprefix.inference.captioner import batched
from frozenprefix.inference.llama_cpp import LlamaCppModel
from frozenprefix.models.language_model import end_tokens

Search = Callable[[torch.Tensor], list[list[int]]]
"""Image features float[n, N, D_enc] -> greedy token ids up to the end token, and with it."""
NAMES = {
    "ours_fp32": "this package, fp32",
    "ours_bf16": "this package, bf16",
    "llama_f32": "llama.cpp, the same weights as float32",
    "llama_file": "llama.cpp, the quantized file",
}


def ours(model: Any, ids: list[int], ends: list[int], new_tokens: int) -> Search:
    """This package's greedy search for a prompt that is an image alone or an image with words."""

    def search(features: torch.Tensor) -> list[list[int]]:
        generated = model.generate(
            input_ids=torch.tensor([ids] * len(features)), image_features=features, num_beams=1, do_sample=False,
            max_new_tokens=new_tokens, eos_token_id=ends, pad_token_id=ends[0],
        )  # fmt: skip
        return [_until(row, ends) for row in generated.tolist()]

    return search


def llama(model: Any, runner: LlamaCppModel, ids: list[int], ends: list[int], new_tokens: int) -> Search:
    """The same in llama.cpp, with the prefix of `model`, a model in float32."""
    place = next(place for place, token in enumerate(ids) if token == model.config.image_token_id)
    before, after = ids[:place], ids[place + model.config.prefix_length :]

    @torch.no_grad()
    def search(features: torch.Tensor) -> list[list[int]]:
        prefixes: list[np.ndarray] = list(model.map_features(features).numpy())
        texts = runner.generate(
            [[before, prefix, after] for prefix in prefixes], max_new_tokens=new_tokens, end_tokens=ends
        )
        return [text.ids for text in texts]

    return search


def _until(row: list[int], ends: list[int]) -> list[int]:
    stop = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
    return row[:stop]


def compare(searches: dict[str, Search], features: torch.Tensor, batch: int, rounds: int) -> dict[str, Any]:
    """Texts of all arms, and their rates over batches of images."""
    texts = {
        name: [ids for part in batched(range(len(features)), batch) for ids in search(features[part])]
        for name, search in searches.items()
    }
    part = features[:batch]
    seconds = common.timed_rounds({name: lambda run=run: run(part) for name, run in searches.items()}, rounds)  # type: ignore[misc]
    rates = {name: len(part) / statistics.median(times) for name, times in seconds.items()}
    reference = texts["ours_fp32"]
    differences = {
        name: [(n, first_difference(a, b)) for n, (a, b) in enumerate(zip(reference, found, strict=True)) if a != b]
        for name, found in texts.items()
    }
    same = {name: 1 - len(found) / len(reference) for name, found in differences.items()}
    return {"images_per_s": rates, "same_as_fp32": same, "differences": differences, "texts": texts}


def quick_report() -> dict[str, Any]:
    """A tiny random language model without a tokenizer."""
    model = our_model(shapes(True)["llama"].config, torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lm.gguf"
        write_language_model(model.language_model, path, "f32")
        runner = LlamaCppModel(path, prompts=4, positions=PREFIX + 8)
        ids, ends = [model.config.image_token_id] * PREFIX, [2]
        searches = {"ours_fp32": ours(model, ids, ends, 6), "llama_f32": llama(model, runner, ids, ends, 6)}
        return compare(searches, features_of(4), 4, 1)


def real_report(arguments: argparse.Namespace) -> dict[str, Any]:
    """A checkpoint whose language model is a GGUF file, on photos."""
    from frozenprefix.assets import resolve

    if arguments.checkpoint is None or arguments.images is None:
        raise ConfigError("--checkpoint and --images: give both, or --quick")
    models = {
        name: Captioner.from_pretrained(arguments.checkpoint, device="cpu", precision=name) for name in ("fp32", "bf16")
    }
    full = models["fp32"]
    files = find_images(arguments.images)[:: max(1, len(find_images(arguments.images)) // arguments.photos)]
    features = full.encoder(files[: arguments.photos])
    ids = full.processor.encode_prompt(full.processor.prompt_for("caption"))
    ends = end_tokens(full.model, full.processor.tokenizer)
    length = len(ids) + arguments.new_tokens
    options = {"prompts": arguments.batch, "positions": length}
    searches = {f"ours_{name}": ours(one.model, ids, ends, arguments.new_tokens) for name, one in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lm.gguf"
        write_language_model(full.model.language_model, path, "f32")
        for name, file in (("llama_f32", path), ("llama_file", resolve(full.model.config.language_model.path))):
            runner = LlamaCppModel(file, **options)
            searches[name] = llama(full.model, runner, ids, ends, arguments.new_tokens)
        report = compare(searches, features, arguments.batch, arguments.rounds)
    texts, named = report.pop("texts"), {}
    for name, found in report["differences"].items():
        decoded = [
            (full.processor.decode(texts["ours_fp32"][n]), full.processor.decode(texts[name][n])) for n, _ in found
        ]
        named[name] = [
            {"image": files[n].name, "token": token, "here": pair[0], "there": pair[1]}
            for (n, token), pair in zip(found, decoded, strict=True)
        ]
    return {**report, "differences": named, "photos": len(features), "batch": arguments.batch}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return quick_report() if arguments.quick else real_report(arguments)


def markdown(report: dict[str, Any]) -> str:
    rows = [
        [
            NAMES[name],
            report["images_per_s"][name],
            report["same_as_fp32"][name],
            "≥ 0.95" if name == "llama_f32" else "",
        ]
        for name in report["images_per_s"]
    ]
    return common.table(["language model", "images/s", "same captions as fp32 here", "target"], rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__)
    parser.add_argument("--checkpoint", help="folder of a checkpoint whose language model is a GGUF file")
    parser.add_argument("--images", type=Path, help="folder of photos")
    parser.add_argument("--photos", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    return common.publish(run, arguments, "llama_cpp", markdown)


if __name__ == "__main__":
    main()
