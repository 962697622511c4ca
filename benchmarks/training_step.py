"""Speed, memory and accuracy of a training step, compared with ClipCap's step and transformers' Llava.

python benchmarks/training_step.py [--quick] [--json report.json] [--shape gpt2|llama]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.baselines import ClipCapStep, LlavaStep
from benchmarks.workloads import (
    CAPTIONS_PER_IMAGE,
    FLOAT,
    PREFIX,
    Shape,
    features_of,
    our_model,
    shapes,
    synthetic_captions,
    targets_of,
)
from frozenprefix.kernels import keep_freed_memory, prepacked_frozen_weights
from frozenprefix.models.fusion import fuse_prefix
from frozenprefix.models.packing import PackedBatch, pack

LARGE_STEP = 4  # a large step has this many times the images of a small one
DATA_SET = 2000  # images; the lengths of their captions determine the length of ClipCap's rows
Step = Callable[[Tensor, list[list[list[int]]]], None]


class OurStep:
    """A step as in training: packing, loss, gradient, clipping, optimizer."""

    def __init__(self, shape: Shape, dtype: torch.dtype):
        self.model = our_model(shape.config, dtype)
        self.prepacked = prepacked_frozen_weights(self.model.language_model)
        self.prepacked.__enter__()  # for as long as this object lives
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=2e-3, fused=True)

    def pack(self, captions: list[list[list[int]]]) -> PackedBatch:
        image = self.model.config.image_token_id
        return pack(targets_of(captions, image), image_token_id=image, prefix_length=PREFIX)

    def __call__(self, features: Tensor, captions: list[list[list[int]]]) -> None:
        self.model(packed=self.pack(captions), image_features=features).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def make_arm(name: str, shape: Shape, captions: list[list[list[int]]]) -> Step:
    kind, _, dtype = name.partition("_")
    if kind == "clipcap":
        return ClipCapStep(shape.config, our_model(shape.config, torch.float32).mapper, captions)
    return LlavaStep(shape.config, FLOAT[dtype]) if kind == "llava" else OurStep(shape, FLOAT[dtype])


def arm_names(shape: Shape) -> list[str]:
    names = ["clipcap", "ours_fp32", "ours_bf16"]
    return [*names, "llava_fp32", "llava_bf16"] if shape.config.model_type == "llama" else names


def batches(shape: Shape, captions: list[list[list[int]]]) -> Callable[[], tuple[Tensor, list[list[list[int]]]]]:
    """A function whose calls return the features and captions of the next step, over and over."""
    numbers = count()

    def following() -> tuple[Tensor, list[list[list[int]]]]:
        start = next(numbers) * shape.images % (len(captions) - shape.images + 1)
        return features_of(shape.images, start), captions[start : start + shape.images]

    return following


def take_steps(name: str, shape: Shape) -> Callable[[], None]:
    """A function whose calls take the next step of an arm. Ours keeps freed memory, as training does."""
    if name.startswith("ours"):
        keep_freed_memory()
    captions = synthetic_captions(DATA_SET, shape.config.vocab_size)
    arm, following = make_arm(name, shape, captions), batches(shape, captions)
    return lambda: arm(*following())


def measure(arguments: argparse.Namespace, shape_name: str, shape: Shape) -> dict[str, Any]:
    """Captions per second and memory of every arm; each arm has its own process."""
    arms = {name: common.Arm(own_command(arguments, shape_name, "--serve", name)) for name in arm_names(shape)}
    with ExitStack() as stack:
        for arm in arms.values():
            stack.enter_context(arm)
        rounds = 1 if arguments.quick else arguments.rounds
        seconds = common.timed_rounds({name: arm.run for name, arm in arms.items()}, rounds, warmup=2)
    memory = {name: arm.peak_rss_mib for name, arm in arms.items()}
    report: dict[str, Any] = {
        "captions_per_s": {
            name: shape.images * CAPTIONS_PER_IMAGE / statistics.median(times) for name, times in seconds.items()
        },
        "ratio_fp32": common.median_ratio(seconds["clipcap"], seconds["ours_fp32"]),
        "ratio_bf16": common.median_ratio(seconds["clipcap"], seconds["ours_bf16"]),
        "peak_rss_mib": memory,
        "peak_rss_ratio": memory["ours_bf16"] / memory["clipcap"],
    }
    if "llava_bf16" in seconds:
        report["ratio_vs_llava"] = common.median_ratio(seconds["llava_bf16"], seconds["ours_bf16"])
        report["ratio_vs_llava_fp32"] = common.median_ratio(seconds["llava_fp32"], seconds["ours_fp32"])
    return report


def utilisations(shape: Shape, rounds: int) -> dict[str, float]:
    """Our bf16 step with few and with many images, in a process that keeps freed memory, as training does."""
    keep_freed_memory()
    small, large = (
        utilisation(replace(shape, images=n), max(2 * rounds, 1)) for n in (shape.images, LARGE_STEP * shape.images)
    )
    return large | {"mfu_small_step": small["mfu"], "gflops_small_step": small["gflops"]}


def utilisation(shape: Shape, rounds: int) -> dict[str, float]:
    """Useful operations of our bf16 step per second, as a share of the machine's matrix-product rate.

    That rate is measured right before and right after every step, because on a shared machine it changes all the time.
    """
    captions = synthetic_captions(DATA_SET, shape.config.vocab_size)
    ours, following = OurStep(shape, torch.bfloat16), batches(shape, captions)
    ours(*following())
    rates, shares, peaks = [], [], []
    for _ in range(rounds):
        step, peak = following(), common.gemm_gflops()
        started = time.perf_counter()
        ours(*step)
        seconds = time.perf_counter() - started
        peaks.append((peak + common.gemm_gflops()) / 2)
        rates.append(useful_flops(ours, step[1]) / seconds / 1e9)
        shares.append(rates[-1] / peaks[-1])
    return {
        "mfu": statistics.median(shares),
        "mfu_low": min(shares),
        "mfu_high": max(shares),
        "gflops": statistics.median(rates),
        "gemm_peak_gflops": statistics.median(peaks),
    }


def useful_flops(ours: OurStep, captions: list[list[list[int]]]) -> float:
    """Multiplications and additions that the step needs; padding is not counted.

    Frozen LM: forward and the gradient of its input, over the tokens of the rows; attention over the tokens that each
    token sees; the head at positions that predict; the mapper with the gradient of its weights.
    """
    packed = ours.pack(captions)
    lm = ours.model.language_model
    config = lm.config.get_text_config()
    place = torch.arange(packed.input_ids.shape[1])
    real = (packed.prefix_index >= 0) | (packed.input_ids != 0)
    sees = (place[None, None, :] <= place[None, :, None]) & (place[None, :, None] < packed.subtree_end[:, None, :])
    pairs, tokens = int((sees & real[:, :, None]).sum()), int(real.sum())
    weights = sum(p.numel() for name, p in lm.base_model.named_parameters() if p.ndim == 2 and not is_embedding(name))
    dim = config.hidden_size
    linear = 2 * 2 * weights * tokens
    attention = 3 * 4 * dim * pairs * config.num_hidden_layers
    head = 2 * 2 * dim * config.vocab_size * len(packed.predict_index)
    mapper = 3 * 2 * sum(p.numel() for p in ours.model.mapper.parameters() if p.ndim == 2) * len(captions)
    return float(linear + attention + head + mapper)


def is_embedding(name: str) -> bool:
    return any(part in ("wte", "wpe", "embed_tokens") for part in name.split("."))


def gradient_error(shape: Shape, images: int = 2) -> float:
    """Relative difference of our mapper gradient to that of single captions through the LM's own forward, in fp32."""
    captions = synthetic_captions(images, shape.config.vocab_size, seed=7)
    features = features_of(images, 7)
    ours = OurStep(shape, torch.float32)
    model = ours.model.eval()
    model(packed=ours.pack(captions), image_features=features).loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in ours.trained])
    ours.prepacked.__exit__(None, None, None)  # the reference uses the plain LM
    model.zero_grad()
    reference_loss(model, features, captions).backward()
    expected = torch.cat([p.grad.flatten() for p in ours.trained])
    return float((gradient - expected).norm() / expected.norm())


def reference_loss(model: Any, features: Tensor, captions: list[list[list[int]]]) -> Tensor:
    image, total, tokens = model.config.image_token_id, torch.zeros(()), 0
    for number, targets in enumerate(targets_of(captions, image)):
        prefix = model.map_features(features[number : number + 1])
        for target in targets:
            ids = torch.tensor([target.input_ids])
            index = torch.where(ids == image, (ids == image).cumsum(-1) - 1, -1)
            embeds = fuse_prefix(model.get_input_embeddings(), ids, index, prefix)
            logits = model.language_model(inputs_embeds=embeds, use_cache=False).logits[0, PREFIX - 1 : -1]
            total = total + nn.functional.cross_entropy(logits.float(), ids[0, PREFIX:], reduction="sum")
            tokens += ids.shape[1] - PREFIX
    return total / tokens


def own_command(arguments: argparse.Namespace, shape_name: str, *what: str) -> list[str]:
    quick = ["--quick"] if arguments.quick else []
    return [
        sys.executable,
        str(Path(__file__).resolve()),
        "--shape",
        shape_name,
        "--rounds",
        str(arguments.rounds),
        *quick,
        *what,
    ]


def in_own_process(command: list[str]) -> dict[str, float]:
    """The JSON object in the last line of a command's output."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    known = shapes(arguments.quick)
    names = [arguments.shape] if arguments.shape else list(known)
    report: dict[str, Any] = {"shapes": {}}
    for name in names:
        shape = known[name]
        figures = measure(arguments, name, shape)
        figures["max_rel_grad_error"] = gradient_error(shape)
        figures |= in_own_process(own_command(arguments, name, "--utilisation"))
        report["shapes"][name] = figures
    return report | headline(list(report["shapes"].values()))


def headline(results: list[dict[str, Any]]) -> dict[str, float]:
    """The worst value of each figure over the language models."""
    lowest = {
        key: min(one[key] for one in results if key in one)
        for key in ("ratio_fp32", "ratio_bf16", "ratio_vs_llava", "mfu", "mfu_small_step", "gemm_peak_gflops")
        if any(key in one for one in results)
    }
    return lowest | {key: max(one[key] for one in results) for key in ("max_rel_grad_error", "peak_rss_ratio")}


def markdown(report: dict[str, Any]) -> str:
    names = list(report["shapes"])
    figures = [
        ("captions/s, ClipCap's step (fp32)", ("captions_per_s", "clipcap"), ""),
        ("captions/s, ours fp32", ("captions_per_s", "ours_fp32"), ""),
        ("captions/s, ours bf16", ("captions_per_s", "ours_bf16"), ""),
        ("captions/s, Llava bf16", ("captions_per_s", "llava_bf16"), ""),
        ("ours fp32 / ClipCap", ("ratio_fp32",), "≥ 6"),
        ("ours bf16 / ClipCap", ("ratio_bf16",), "≥ 12"),
        ("ours bf16 / Llava bf16", ("ratio_vs_llava",), "≥ 4"),
        ("ours fp32 / Llava fp32", ("ratio_vs_llava_fp32",), ""),
        ("relative error of the mapper's gradient, fp32", ("max_rel_grad_error",), "< 1e-5"),
        ("peak memory, ours bf16 / ClipCap", ("peak_rss_ratio",), "≤ 0.5"),
        ("bf16 matrix products, GFLOP/s", ("gemm_peak_gflops",), ""),
        ("useful share of that rate in our bf16 step, 8 images", ("mfu_small_step",), ""),
        ("the same, 32 images", ("mfu",), "≥ 0.65"),
        ("lowest of these steps", ("mfu_low",), ""),
        ("highest", ("mfu_high",), ""),
    ]
    rows = []
    for label, path, target in figures:
        cells: list[Any] = []
        for name in names:
            value: Any = report["shapes"][name]
            for key in path:
                value = value.get(key, "–") if isinstance(value, dict) else value
            cells.append(value)
        rows.append([label, *cells, target])
    return common.table(["", *names, "target"], rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__)
    parser.add_argument("--shape", choices=["gpt2", "llama"], help="one language model only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--utilisation", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve:
        common.serve(take_steps(arguments.serve, shapes(arguments.quick)[arguments.shape]))
        return {}
    if arguments.utilisation:
        shape, rounds = shapes(arguments.quick)[arguments.shape], 1 if arguments.quick else arguments.rounds
        sys.stdout.write(json.dumps(utilisations(shape, rounds)) + "\n")
        return {}
    common.start_logging()
    report = run(arguments)
    # one table per language model, so that each can be measured alone
    for name, figures in report["shapes"].items():
        common.finish(report, arguments, f"training-{name}", markdown({"shapes": {name: figures}}))
    return report


if __name__ == "__main__":
    main()
