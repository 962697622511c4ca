"""Memory of a long run: packed steps with rows of all lengths through a frozen LM.

    python benchmarks/memory.py [--quick] [--json FILE]

oneDNN keeps a compiled kernel for every number of rows of a product, in a cache of its own and in PyTorch's, 1,024
entries each. The package pads rows to multiples of 32. The caches can be bounded as well, by the environment variables
ONEDNN_PRIMITIVE_CACHE_CAPACITY and LRU_CACHE_CAPACITY, which have to be set before torch is imported. All four
combinations run, each in a process of its own, because the caches last as long as the process. Reported are the
resident memory at the end, its slope in MB per step after the first fifth, fitted by least squares, and the time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
# multiple to which rows are padded, and entries of the caches (None for the libraries' own number)
ARMS = {
    "rows as they are": (1, None),
    "rows padded": (32, None),
    "caches bounded": (1, 128),
    "rows padded, caches bounded": (32, 128),
}


def steps(multiple: int, count: int, quick: bool) -> dict[str, Any]:
    """Run the steps in this process."""
    import numpy as np
    import torch
    from torch import nn

    from benchmarks.workloads import PREFIX, random_lm, shapes, synthetic_captions, targets_of
    from frozenprefix.kernels import attention_for_rows, keep_freed_memory, linear, prepacked_frozen_weights
    from frozenprefix.models.packing import ancestor_mask, pack
    from frozenprefix.models.packing.loss import next_token_loss

    keep_freed_memory()
    linear.ROW_MULTIPLE = multiple
    config = shapes(quick=True)["llama"].config
    if not quick:
        config.update({"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 8192})
    lm = random_lm(config).requires_grad_(False).eval()
    size, image_id = lm.config.hidden_size, config.vocab_size
    memory, before = [], time.perf_counter()
    with prepacked_frozen_weights(lm):
        for number in range(count):
            captions = synthetic_captions(4 + number % 5, config.vocab_size, seed=number)
            rows = pack(targets_of(captions, image_id), image_token_id=image_id, prefix_length=PREFIX)
            embeds = torch.randn(*rows.input_ids.shape, size, requires_grad=True)
            mask = ancestor_mask(rows.subtree_end, torch.float32)
            with attention_for_rows(lm):
                hidden = lm.base_model(
                    inputs_embeds=embeds, attention_mask=mask, position_ids=rows.position_ids, use_cache=False
                ).last_hidden_state.flatten(0, 1)[rows.predict_index]
            head: nn.Module = lm.get_output_embeddings()
            next_token_loss(hidden, head, rows.edge_source, rows.edge_label, rows.edge_weight).backward()
            memory.append(_resident_mb())
    settled = memory[count // 5 :]
    slope = float(np.polyfit(range(len(settled)), settled, 1)[0])
    return {"mb": memory[-1], "mb_per_step": slope, "seconds": time.perf_counter() - before}


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    count = 20 if arguments.quick else arguments.steps
    results = {}
    for name, (multiple, capacity) in ARMS.items():
        environment = {key: value for key, value in os.environ.items() if key not in CACHES}
        if capacity is not None:
            environment |= dict.fromkeys(CACHES, str(capacity))
        command = [sys.executable, __file__, "--arm", str(multiple), "--steps", str(count)]
        command += ["--quick"] if arguments.quick else []
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        results[name] = json.loads(output.splitlines()[-1])
    return {"steps": count, "arms": results}


def markdown(report: dict[str, Any]) -> str:
    from benchmarks import common

    rows = [[name, arm["mb"], arm["mb_per_step"], arm["seconds"]] for name, arm in report["arms"].items()]
    return common.table([f"{report['steps']} steps", "MB at the end", "MB per step", "seconds"], rows)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    from benchmarks import common

    options = common.parser(__doc__)
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--arm", type=int, help=argparse.SUPPRESS)
    parsed = options.parse_args(arguments)
    if parsed.arm is not None:
        sys.stdout.write(json.dumps(steps(parsed.arm, parsed.steps, parsed.quick)) + "\n")
        return {}
    return common.publish(run, parsed, None, markdown)


if __name__ == "__main__":
    main()
