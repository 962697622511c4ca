"""Recipes that take a second or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tiny_recipe_dict(lm: Path, data: Path, output_dir: Path) -> dict[str, Any]:
    """A run of 6 steps that takes a second or two."""
    return {
        "name": "tiny",
        "output_dir": str(output_dir),
        "model": {
            "vision_encoder": {"source": "timm", "name": "test_vit", "weights": "random", "image_size": 32},
            "mapper": {"type": "mlp", "prefix_length": 2, "hidden_dim": 32, "tokens": "flatten"},
            "language_model": {"path": str(lm)},
        },
        "data": {
            "train": [
                {"type": "captions", "path": str(data), "split": "train", "name": "captions"},
                {"type": "qa", "path": str(data), "split": "train", "name": "qa"},
            ],
            "validation": [{"type": "captions", "path": str(data), "split": "val"}],
            "workers": 0,
        },
        "training": {
            "max_steps": 6,
            "precision": "fp32",
            "warmup_steps": 0,
            "images_per_step": 4,
            "targets_per_image": 2,
            "learning_rate": 0.01,
            "log_every": 1,
            "validate_every": 3,
            "save_every": 3,
        },
    }
