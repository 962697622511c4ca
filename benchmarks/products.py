"""Products with frozen weights on the CPU: packed for oneDNN, as training has them, against PyTorch's own.

python benchmarks/products.py [--quick] [--json report.json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from frozenprefix.models.packed_weights import packable_dtypes, packed_frozen_weights

ROWS = 512  # tokens of a step


def forth_and_back(layers: nn.ModuleList, inputs: list[Tensor]) -> list[Tensor]:
    """Every layer's output, and the gradient of its input."""
    made = []
    for layer, x in zip(layers, inputs, strict=True):
        output = layer(x)
        made += [output.detach(), *torch.autograd.grad(output, x, torch.ones_like(output))]
    return made


def measure(name: str, dtype: torch.dtype, sizes: list[tuple[int, int]], rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    plain, packed = (
        nn.ModuleList(nn.Linear(*size, bias=False) for size in sizes).to(dtype).requires_grad_(False) for _ in range(2)
    )
    packed.load_state_dict(plain.state_dict())
    inputs = [torch.randn(ROWS, size, dtype=dtype, requires_grad=True) for size, _ in sizes]
    with packed_frozen_weights(packed):
        arms = {"plain": plain, "packed": packed}
        runs = {arm: lambda layers=layers: forth_and_back(layers, inputs) for arm, layers in arms.items()}
        seconds = common.timed_rounds(runs, rounds, warmup=2)
        pairs = list(zip(runs["packed"](), runs["plain"](), strict=True))
    operations = 2 * 2 * ROWS * sum(width_in * width_out for width_in, width_out in sizes)
    return {
        "name": f"{name}, {str(dtype).removeprefix('torch.')}",
        "gflops": {arm: operations / statistics.median(times) / 1e9 for arm, times in seconds.items()},
        "ratio": common.median_ratio(seconds["plain"], seconds["packed"]),
        "max_difference": max(float((a - b).norm() / b.norm()) for a, b in pairs),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    width, vocabulary = 768, 50257
    shapes = {
        "a layer of GPT-2 small": [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)],
        "its head": [(width, vocabulary)],
    }
    rounds = 20
    if arguments.quick:
        shapes, rounds = {"tiny": [(16, 32), (32, 16)]}, 2
    cases = [measure(name, dtype, sizes, rounds) for name, sizes in shapes.items() for dtype in packable_dtypes()]
    return {"cases": cases}


def markdown(report: dict[str, Any]) -> str:
    rows = [
        [case["name"], case["gflops"]["plain"], case["gflops"]["packed"], case["ratio"]] for case in report["cases"]
    ]
    text = f"{ROWS} rows through frozen weights, and the gradient back to them, GFLOP/s.\n\n"
    return text + common.table(["", "PyTorch's", "packed", "ratio"], rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = common.parser(__doc__).parse_args(argv)
    common.start_logging()
    report = run(arguments)
    common.finish(report, arguments, "products", markdown(report))
    return report


if __name__ == "__main__":
    main()
