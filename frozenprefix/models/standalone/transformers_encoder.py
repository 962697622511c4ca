"""Loading a vision model of transformers in the code of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModel

from frozenprefix.models.vision.base import reading_options
from frozenprefix.models.vision.transformers_encoder import TransformersEncoder


def load_encoder(section: dict[str, Any], folder: Path) -> TransformersEncoder:
    """The frozen encoder in a checkpoint's folder, in float32."""
    place = folder / "vision_encoder"
    network, report = AutoModel.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:
        network.pooler = None  # its weights would be random
    return TransformersEncoder(network, image_size=section["image_size"], **reading_options(SimpleNamespace(**section)))
