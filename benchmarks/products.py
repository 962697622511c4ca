"""Products with frozen weights on the CPU, and whole decoder layers, as in training and in plain PyTorch.

python benchmarks/products.py [--quick] [--json report.json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.workloads import random_lm
from benchmarks.workloads import shapes as workload_shapes
from frozenprefix.kernels import (
    additive_mask,
    attention_for_rows,
    keep_freed_memory,
    prepackable_dtypes,
    prepackable_layers,
    prepacked_frozen_weights,
)
from frozenprefix.kernels.linear import PrepackedForward
from frozenprefix.kernels.llama_layer import FrozenLayer

ROWS = 512  # tokens per step
TEXTS = 4  # texts that these tokens belong to
LAYERS = 4


def forth_and_back(layers: nn.ModuleList, inputs: list[Tensor]) -> list[Tensor]:
    """The output of every layer, and the gradient of its input."""
    tensors = []
    for layer, x in zip(layers, inputs, strict=True):
        output = layer(x)
        tensors += [output.detach(), *torch.autograd.grad(output, x, torch.ones_like(output))]
    return tensors


def measure(name: str, dtype: torch.dtype, sizes: list[tuple[int, int]], rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    plain, prepacked = (
        nn.ModuleList(nn.Linear(*size, bias=False) for size in sizes).to(dtype).requires_grad_(False) for _ in range(2)
    )
    prepacked.load_state_dict(plain.state_dict())
    inputs = [torch.randn(ROWS, size, dtype=dtype, requires_grad=True) for size, _ in sizes]
    with prepacked_frozen_weights(prepacked):
        arms = {"plain": plain, "prepacked": prepacked}
        runs = {arm: lambda layers=layers: forth_and_back(layers, inputs) for arm, layers in arms.items()}
        operations = 2 * 2 * ROWS * sum(width_in * width_out for width_in, width_out in sizes)
        return compared(name, dtype, runs, operations, rounds)


def compared(
    name: str, dtype: torch.dtype, runs: dict[str, Callable[[], list[Tensor]]], operations: int, rounds: int
) -> dict[str, Any]:
    seconds = common.timed_rounds(runs, rounds, warmup=2)
    pairs = list(zip(runs["prepacked"](), runs["plain"](), strict=True))
    return {
        "name": f"{name}, {str(dtype).removeprefix('torch.')}",
        "gflops": {arm: operations / statistics.median(times) / 1e9 for arm, times in seconds.items()},
        "ratio": common.median_ratio(seconds["plain"], seconds["prepacked"]),
        "max_difference": max(float((a - b).norm() / b.norm()) for a, b in pairs),
    }


def measure_layers(
    name: str, config: PreTrainedConfig, dtype: torch.dtype, rounds: int, *, whole: bool
) -> dict[str, Any]:
    """Decoder layers over rows of one text each; both arms use the attention of training."""
    plain, prepacked = (random_lm(config, dtype).requires_grad_(False).eval() for _ in range(2))
    x = torch.randn(TEXTS, ROWS // TEXTS, config.hidden_size, dtype=dtype, requires_grad=True)
    mask = additive_mask(torch.ones(TEXTS, *2 * x.shape[1:2], dtype=torch.bool).tril(), dtype)

    def forth_and_back_through(lm: PreTrainedModel) -> list[Tensor]:
        with attention_for_rows(lm):
            hidden = lm.base_model(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
        return [hidden.detach(), *torch.autograd.grad(hidden, x, torch.ones_like(hidden))]

    weights = sum(layer.weight.numel() for layer in prepackable_layers(plain.base_model))
    with prepacked_frozen_weights(prepacked):
        if not whole:
            keep_own_layers(prepacked)
        runs = {"plain": lambda: forth_and_back_through(plain), "prepacked": lambda: forth_and_back_through(prepacked)}
        return compared(name, dtype, runs, 2 * 2 * ROWS * weights, rounds)


def keep_own_layers(language_model: PreTrainedModel) -> None:
    """Within `prepacked_frozen_weights`: keep prepacked products, but the model's own layers."""
    for module in language_model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, FrozenLayer):
            del module.forward
        elif isinstance(forward, PrepackedForward):
            forward.copied_elsewhere = False


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    keep_freed_memory()
    width, vocabulary = 768, 50257
    shapes = {
        "a layer of GPT-2 small": [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)],
        "its head": [(width, vocabulary)],
    }
    rounds = 20
    if arguments.quick:
        shapes, rounds = {"tiny": [(16, 32), (32, 16)]}, 2
    cases = [measure(name, dtype, sizes, rounds) for name, sizes in shapes.items() for dtype in prepackable_dtypes()]
    config = workload_shapes(arguments.quick)["llama"].config
    config.num_hidden_layers = LAYERS
    for name, whole in (("layers of SmolLM2-135M", True), ("the same, prepacked products only", False)):
        cases += [measure_layers(name, config, dtype, rounds, whole=whole) for dtype in prepackable_dtypes()]
    return {"cases": cases}


def markdown(report: dict[str, Any]) -> str:
    rows = [
        [case["name"], case["gflops"]["plain"], case["gflops"]["prepacked"], case["ratio"]] for case in report["cases"]
    ]
    text = f"{ROWS} rows through frozen weights, and the gradient back to them, GFLOP/s.\n\n"
    return text + common.table(["", "PyTorch's", "prepacked", "ratio"], rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return common.publish(run, common.parser(__doc__).parse_args(argv), "products", markdown)


if __name__ == "__main__":
    main()
