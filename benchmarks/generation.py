"""Images captioned per second with beam search, compared with ClipCap's script.

    python benchmarks/generation.py [--quick] [--json report.json]

The language model has the size of GPT-2 small and random weights. No caption ends early, so that every method
generates the same number of tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.baselines import clipcap_beam_search
from benchmarks.workloads import FLOAT, PREFIX, features_of, our_model, shapes

BEAMS = 5


def ours(model: Any, features: Tensor, new_tokens: int) -> list[list[int]]:
    """Captions of features float[n, 1, 512] as one batch, through `model.generate`."""
    ids = torch.full((len(features), PREFIX), model.config.image_token_id)
    generated = model.generate(
        input_ids=ids, image_features=features, num_beams=BEAMS, max_new_tokens=new_tokens, eos_token_id=None,
        pad_token_id=0, do_sample=False,
    )  # fmt: skip
    return generated.tolist()


def transformers_search(model: Any, features: Tensor, new_tokens: int) -> list[list[int]]:
    """The same through transformers' own beam search, batched and cached."""
    embeds = model.map_features(features).to(model.lm.dtype)
    generated = model.language_model.generate(
        inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long), num_beams=BEAMS,
        max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0, do_sample=False,
    )  # fmt: skip
    return generated.tolist()


@torch.no_grad()
def measure(quick: bool, new_tokens: int, batch: int, rounds: int, alone: int) -> dict[str, Any]:
    """Rates of all arms at one caption length.

    Args:
        batch: images per batch.
        alone: images for the method without batches, and for the comparison of batched with single captions.
    """
    config = shapes(quick)["gpt2"].config
    models = {dtype: our_model(config, FLOAT[dtype]).eval() for dtype in FLOAT}
    features = features_of(batch)
    prefix = models["fp32"].map_features(features[:alone])

    def clipcap() -> None:
        for image in prefix:
            clipcap_beam_search(
                models["fp32"].language_model, image[None], num_beams=BEAMS, new_tokens=new_tokens, end=None
            )

    arms: dict[str, Any] = {
        f"ours_{dtype}": lambda model=model: ours(model, features, new_tokens) for dtype, model in models.items()
    }
    arms["transformers_bf16"] = lambda: transformers_search(models["bf16"], features, new_tokens)
    seconds = common.timed_rounds({"clipcap": clipcap} | arms, rounds)
    counts = dict.fromkeys(arms, batch) | {"clipcap": len(prefix)}
    each = {name: [second / counts[name] for second in times] for name, times in seconds.items()}
    report: dict[str, Any] = {"images_per_s": {name: 1 / statistics.median(times) for name, times in each.items()}}
    report["ratio"] = common.median_ratio(each["clipcap"], each["ours_bf16"])
    report["ratio_fp32"] = common.median_ratio(each["clipcap"], each["ours_fp32"])
    report["ratio_transformers_bf16"] = common.median_ratio(each["clipcap"], each["transformers_bf16"])
    report["same_captions"] = {
        dtype: same_captions(model, features, new_tokens, alone) for dtype, model in models.items()
    }
    return report


def same_captions(model: Any, features: Tensor, new_tokens: int, alone: int) -> float:
    """Share of captions that are the same for an image alone and in a batch."""
    together = ours(model, features, new_tokens)
    singles = [ours(model, features[i : i + 1], new_tokens)[0] for i in range(alone)]
    return sum(a == b for a, b in zip(singles, together, strict=False)) / alone


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.quick:
        lengths = {6: measure(True, 6, 3, 1, 2)}
    else:
        lengths = {
            tokens: measure(False, tokens, arguments.batch, arguments.rounds, arguments.alone) for tokens in (30, 12)
        }
    first = next(iter(lengths.values()))
    keys = ("images_per_s", "ratio", "ratio_fp32", "ratio_transformers_bf16", "same_captions")
    return {"batch": arguments.batch, "new_tokens": lengths} | {key: first[key] for key in keys}


def markdown(report: dict[str, Any]) -> str:
    lengths: dict[int, Any] = report["new_tokens"]
    rows: list[list[Any]] = []
    names = {
        "clipcap": "images/s, ClipCap's script (fp32, one at a time, no cache)",
        "transformers_bf16": "images/s, transformers' `generate`, bf16",
        "ours_fp32": "images/s, ours fp32",
        "ours_bf16": "images/s, ours bf16",
    }
    for name, label in names.items():
        rows.append([label, *(one["images_per_s"][name] for one in lengths.values()), ""])
    for key, label, target in (
        ("ratio", "ours bf16 / ClipCap", "≥ 30"),
        ("ratio_fp32", "ours fp32 / ClipCap", ""),
        ("ratio_transformers_bf16", "transformers bf16 / ClipCap", ""),
    ):
        rows.append([label, *(one[key] for one in lengths.values()), target])
    for dtype, target in (("fp32", "1"), ("bf16", "")):
        shares = [one["same_captions"][dtype] for one in lengths.values()]
        rows.append([f"share of captions that are the same alone and in a batch, {dtype}", *shares, target])
    head = ["", *(f"{tokens} words" for tokens in lengths), "target"]
    return f"Beam search with {BEAMS} beams, {report['batch']} images in a batch.\n\n" + common.table(head, rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--alone", type=int, default=4, help="images for the method without batches")
    arguments = parser.parse_args(argv)
    return common.publish(run, arguments, "generation", markdown)


if __name__ == "__main__":
    main()
