"""How the time of a training step grows with targets per image, images, prefix length and the size of the LM.

python benchmarks/scaling.py [--quick] [--json report.json]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks import common
from benchmarks.plan_check import small_llama
from benchmarks.workloads import CAPTIONS_PER_IMAGE, END, features_of, our_model, synthetic_captions
from frozenprefix.models.packing import Target, pack
from frozenprefix.planning.costs import LanguageModelShape

TARGET_EXPONENT = 1.05


@dataclass(frozen=True)
class Size:
    """The size of one training step."""

    images: int = 4
    targets: int = 4
    prefix: int = 10
    hidden: int = 384
    layers: int = 8
    vocabulary: int = 16_000


QUICK = Size(images=2, targets=2, hidden=48, layers=2, vocabulary=500)
# field of `Size` -> its values
SWEEPS: dict[str, tuple[int, ...]] = {
    "targets": (1, 2, 4, 8, 16, 32),
    "images": (1, 2, 4, 8, 16, 32),
    "prefix": (4, 8, 16, 32, 64),
    "hidden": (192, 384, 576, 768),
    "layers": (4, 8, 16, 32),
}
QUICK_SWEEPS: dict[str, tuple[int, ...]] = {"targets": (1, 4), "images": (1, 4), "prefix": (4, 16), "layers": (1, 2)}
LABELS = {
    "targets": "targets per image",
    "images": "images per step",
    "prefix": "prefix length",
    "hidden": "LM width (8 layers)",
    "layers": "LM layers",
}


class Step:
    """One training step, packing included, of a model with random weights."""

    def __init__(self, size: Size):
        self.size = size
        config = small_llama(size.hidden, size.layers, size.vocabulary)
        self.model = our_model(config, torch.bfloat16, prefix_length=size.prefix, hidden_dim=256)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3)
        self.texts = captions(size)
        self.features = features_of(size.images)
        self.weights = LanguageModelShape.from_model(self.model.language_model).matrix_weights

    def __call__(self) -> None:
        image, prefix = self.size.vocabulary, self.size.prefix
        groups = [[Target([image] * prefix + words + [END], prefix) for words in texts] for texts in self.texts]
        packed = pack(groups, image_token_id=image, prefix_length=prefix)
        self.model(packed=packed, image_features=self.features).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def captions(size: Size) -> list[list[list[int]]]:
    """`targets` captions for each image. Only groups of five share words, as captions of one image do."""
    fives = -(-size.targets // CAPTIONS_PER_IMAGE)
    groups = synthetic_captions(size.images * fives, size.vocabulary)
    joined = [[text for five in groups[i * fives : (i + 1) * fives] for text in five] for i in range(size.images)]
    return [texts[: size.targets] for texts in joined]


def exponent(x: list[float], seconds: list[float]) -> float:
    """k in seconds = c * x^k, by least squares on the logarithms."""
    return float(np.polyfit(np.log(x), np.log(seconds), 1)[0])


def sweep(base: Size, name: str, values: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Median seconds of a step for each value, and the exponent."""
    steps = {value: Step(replace(base, **{name: value})) for value in values}
    arms: dict[str, Callable[[], None]] = {str(value): step for value, step in steps.items()}
    timed = common.timed_rounds(arms, rounds)
    seconds = [statistics.median(timed[str(value)]) for value in values]
    per_target = [s / (step.size.images * step.size.targets) for s, step in zip(seconds, steps.values(), strict=True)]
    return {
        "values": list(values),
        "lm_weights": [step.weights for step in steps.values()],
        "seconds_per_step": seconds,
        "ms_per_target": [1000 * s for s in per_target],
        "exponent": exponent([float(value) for value in values], seconds),
        "exponent_in_lm_weights": exponent([step.weights for step in steps.values()], seconds)
        if name in ("hidden", "layers")
        else None,
    }


def main() -> None:
    arguments = common.parser(__doc__).parse_args()
    common.start_logging()
    base, sweeps = (QUICK, QUICK_SWEEPS) if arguments.quick else (Size(), SWEEPS)
    results = {name: sweep(base, name, values, 1 if arguments.quick else 7) for name, values in sweeps.items()}
    report = {
        "benchmark": "scaling",
        "sweeps": results,
        "target_exponent": results["targets"]["exponent"],
        "target_exponent_limit": TARGET_EXPONENT,
        "holds": results["targets"]["exponent"] <= TARGET_EXPONENT,
    }
    rows = [
        [
            LABELS[name],
            ", ".join(map(str, one["values"])),
            ", ".join(f"{ms:.3g}" for ms in one["ms_per_target"]),
            f"{one['exponent']:.2f}",
        ]
        for name, one in results.items()
    ]
    header = ["what grows", "values", "ms per target", "exponent of a step's time"]
    common.finish(report, arguments, "scaling", common.table(header, rows))


if __name__ == "__main__":
    main()
