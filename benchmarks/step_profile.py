"""The operations that take the time of a training step, by torch's profiler.

python benchmarks/step_profile.py [--quick] [--json report.json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.training_step import DATA_SET, LARGE_STEP, OurStep, batches
from benchmarks.workloads import Shape, shapes, synthetic_captions
from frozenprefix.kernels import keep_freed_memory, prepackable_dtypes

# kind -> prefixes of the names of its operations
KINDS = {
    "products with frozen weights": ("mkldnn::_linear_pointwise",),
    "attention: products and softmax": ("aten::bmm", "aten::baddbmm", "aten::_softmax"),
    "norms and activations": (
        "aten::native_layer_norm",
        "aten::native_batch_norm",
        "aten::linalg_vector_norm",
        "aten::silu",
        "aten::gelu",
    ),
    "mapper and optimizer: products, AdamW": ("aten::mm", "aten::addmm", "aten::tanh", "aten::_fused_adamw_"),
    "copies": ("aten::copy_", "aten::cat"),
    "other arithmetic": ("aten::mul", "aten::add", "aten::sub", "aten::div", "aten::exp", "aten::amax", "aten::sum"),
}
REST = "everything else, including Python"


def kind_of(operation: str) -> str:
    """The kind with the longest matching prefix: `aten::addmm` is not `aten::add`."""
    fitting = [(len(start), kind) for kind, starts in KINDS.items() for start in starts if operation.startswith(start)]
    return max(fitting)[1] if fitting else REST


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """Median seconds of a step in the narrowest dtype with fast products here, and the shares of a typical step."""
    captions = synthetic_captions(DATA_SET, shape.config.vocab_size)
    ours, following = OurStep(shape, prepackable_dtypes()[-1]), batches(shape, captions)
    for _ in range(2):
        ours(*following())
    plain, profiled = [], []
    for _ in range(rounds):
        step = following()
        started = time.perf_counter()
        ours(*step)
        plain.append(time.perf_counter() - started)
        with profile(activities=[ProfilerActivity.CPU]) as events:
            started = time.perf_counter()
            ours(*step)
            seconds = time.perf_counter() - started
        spent = dict.fromkeys(KINDS, 0.0)
        for event in events.key_averages():
            if (kind := kind_of(event.key)) != REST:
                spent[kind] += event.self_cpu_time_total / 1e6
        spent[REST] = seconds - sum(spent.values())
        profiled.append({kind: value / seconds for kind, value in spent.items()})
    typical = sorted(profiled, key=lambda one: one["products with frozen weights"])[rounds // 2]
    return {"seconds": statistics.median(plain), "shares": typical}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    keep_freed_memory()
    rounds, times = (1, 1) if arguments.quick else (5, LARGE_STEP)
    sizes = {name: replace(one, images=times * one.images) for name, one in shapes(arguments.quick).items()}
    return {"shapes": {name: measure(shape, rounds) | {"images": shape.images} for name, shape in sizes.items()}}


def markdown(report: dict[str, Any]) -> str:
    results = report["shapes"]
    rows: list[list[Any]] = [[kind, *(one["shares"][kind] for one in results.values())] for kind in [*KINDS, REST]]
    rows.append(["seconds a step, without the profiler", *(one["seconds"] for one in results.values())])
    header = ["share of a step", *(f"{name}, {one['images']} images" for name, one in results.items())]
    return common.table(header, rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return common.publish(run, common.parser(__doc__).parse_args(argv), "step-profile", markdown)


if __name__ == "__main__":
    main()
