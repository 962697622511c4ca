"""Latency of one image: encoding, prefix, first token and every further token, beside transformers' `generate`.

    python benchmarks/latency.py [--quick] [--json FILE] [--words 12]

One image at a time, greedy. The encoder is EfficientNet-Lite0 at 224 pixels, the language model has the shapes of
SmolLM2-135M, both with random weights; no caption ends early. Both arms get the same prefix embeddings and differ in
the search alone: this package's, and transformers' `generate` on the same language model. "First token" is the
prefix read and one token chosen. The median (p50) and the 95th percentile (p95) are taken over the images.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.workloads import FLOAT, PREFIX, features_of, our_model, shapes
from frozenprefix.kernels.precision import measure_products
from frozenprefix.models.encoder_configuration import TimmEncoderConfig
from frozenprefix.models.vision import build_vision_encoder

ARMS = ("ours", "transformers")


def seconds_of(call: Callable[[], Any]) -> float:
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


class OneImage:
    """One image at a time, through all parts."""

    def __init__(self, quick: bool, precision: str):
        dtype = FLOAT[precision]
        self.model = our_model(shapes(quick)["llama"].config, dtype).eval()
        config = TimmEncoderConfig(
            source="timm", name="test_vit" if quick else "tf_efficientnet_lite0", weights="random",
            image_size=32 if quick else 224, dtype=str(dtype).removeprefix("torch."),
        )  # fmt: skip
        self.encoder = build_vision_encoder(config).module.eval()
        self.pixels = torch.rand(1, 3, config.image_size or 224, config.image_size or 224).to(dtype)
        self.ids = torch.full((1, PREFIX), self.model.config.image_token_id)

    def write(self, arm: str, features: Tensor, words: int) -> Tensor:
        """`words` tokens behind the image."""
        options: dict[str, Any] = {"max_new_tokens": words, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        if arm == "ours":
            return self.model.generate(input_ids=self.ids, image_features=features, **options)
        embeds = self.model.map_features(features).to(self.model.lm.dtype)
        mask = torch.ones(1, embeds.shape[1], dtype=torch.long)
        return self.model.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **options)

    def times(self, words: int, seed: int) -> dict[str, float]:
        """Seconds of every part, for one image."""
        features = features_of(1, seed)
        prefix = seconds_of(lambda: self.model.map_features(features))
        found = {"encode": seconds_of(lambda: self.encoder(self.pixels)), "prefix": prefix}
        for arm in ARMS:
            first = seconds_of(lambda arm=arm: self.write(arm, features, 1))
            whole = seconds_of(lambda arm=arm: self.write(arm, features, words))
            found[f"{arm}: first token"] = first - prefix
            found[f"{arm}: further token"] = (whole - first) / (words - 1)
            found[f"{arm}: caption"] = found["encode"] + whole
        return found


@torch.no_grad()
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    config = shapes(arguments.quick)["llama"].config
    rates = measure_products(config.hidden_size, config.intermediate_size)
    precision = arguments.precision or ("bf16" if rates.faster == torch.bfloat16 else "fp32")
    work, images = OneImage(arguments.quick, precision), 3 if arguments.quick else arguments.images
    work.times(arguments.words, seed=0)  # warm-up
    rows = [work.times(arguments.words, seed) for seed in range(1, images + 1)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    features = features_of(1)
    same = [work.write(arm, features, arguments.words).tolist() for arm in ARMS]
    report: dict[str, Any] = {
        "precision": precision,
        "words": arguments.words,
        "seconds": {
            name: {"p50": float(np.percentile(values, 50)), "p95": float(np.percentile(values, 95))}
            for name, values in columns.items()
        },
        # of the same image in the same minute
        "ratio_further_token": statistics.median(
            row["transformers: further token"] / row["ours: further token"] for row in rows
        ),
        "ratio_caption": statistics.median(row["transformers: caption"] / row["ours: caption"] for row in rows),
        "same_tokens": same[0] == same[1],
    }
    if arguments.quick:
        report["note"] = "quick: tiny models and three images; it shows only that the script works"
    return report


def markdown(report: dict[str, Any]) -> str:
    rows = [[name, 1000 * each["p50"], 1000 * each["p95"]] for name, each in report["seconds"].items()]
    rows += [
        ["transformers / ours, further token", report["ratio_further_token"], ""],
        ["transformers / ours, caption", report["ratio_caption"], ""],
    ]
    head = f"One image, greedy, {report['words']} tokens, {report['precision']}.\n\n"
    return head + common.table(["milliseconds", "p50", "p95"], rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--words", type=int, default=12)
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="by default the faster one here")
    return common.publish(run, parser.parse_args(argv), "latency", markdown)


if __name__ == "__main__":
    main()
