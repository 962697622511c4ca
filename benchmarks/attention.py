"""Attention over packed rows on the CPU: plain matrix products against torch's SDPA kernel.

python benchmarks/attention.py [--quick] [--json report.json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from frozenprefix.kernels import additive_mask, matmul_attention

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return matmul_attention(nn.Identity(), query, key, value, mask)[0]


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)
    return mixed.transpose(1, 2)


def inputs(rows: int, heads: int, groups: int, length: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value with gradients, and a causal mask."""
    torch.manual_seed(0)
    tensors = [torch.randn(rows, n, length, dim, dtype=dtype, requires_grad=True) for n in (heads, groups, groups)]
    visible = torch.ones(length, length, dtype=torch.bool).tril().expand(rows, -1, -1)
    return [*tensors, additive_mask(visible, dtype)]


def step(attention: Attention, tensors: list[Tensor]) -> list[Tensor]:
    """Output and the gradients of query, key and value."""
    mixed = attention(*tensors)
    return [mixed, *torch.autograd.grad(mixed.float().pow(2).sum(), tensors[:3])]


def measure(name: str, dtype: torch.dtype, sizes: tuple[int, int, int, int, int], rounds: int) -> dict[str, Any]:
    tensors = inputs(*sizes, dtype)
    arms: dict[str, Attention] = {"plain": plain, "sdpa": sdpa}
    runs = {arm: lambda attention=attention: step(attention, tensors) for arm, attention in arms.items()}
    seconds = common.timed_rounds(runs, rounds, warmup=min(rounds, 3))
    exact = inputs(*sizes, torch.float32)
    pairs = [(a.detach(), b.detach()) for a, b in zip(step(plain, exact), step(sdpa, exact), strict=True)]
    return {
        "name": name,
        "milliseconds": {arm: 1e3 * statistics.median(times) for arm, times in seconds.items()},
        "ratio": common.median_ratio(seconds["sdpa"], seconds["plain"]),
        "max_difference_fp32": max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    # rows, query heads, key heads, tokens in a row, dimension of a head
    sizes = {"GPT-2 small": (12, 12, 12, 80, 64), "SmolLM2-135M": (12, 9, 3, 80, 64)}
    rounds = 30
    if arguments.quick:
        sizes, rounds = {"tiny": (2, 4, 2, 12, 8)}, 2
    cases = [
        measure(f"{name}, {str(dtype).removeprefix('torch.')}", dtype, size, rounds)
        for name, size in sizes.items()
        for dtype in (torch.bfloat16, torch.float32)
    ]
    return {"cases": cases, "ratio": min(case["ratio"] for case in cases)}


def markdown(report: dict[str, Any]) -> str:
    rows = [
        [case["name"], case["milliseconds"]["sdpa"], case["milliseconds"]["plain"], case["ratio"]]
        for case in report["cases"]
    ]
    text = "Forward and backward over 12 rows of 80 tokens, one layer, milliseconds.\n\n"
    return text + common.table(["", "SDPA", "plain products", "ratio"], rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = common.parser(__doc__).parse_args(argv)
    return common.publish(run, arguments, "attention", markdown)


if __name__ == "__main__":
    main()
