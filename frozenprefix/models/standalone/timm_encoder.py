"""Loading a timm encoder in the code of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
from safetensors.torch import load_file

from frozenprefix.models.vision.timm_encoder import TimmEncoder, assemble_timm


def load_encoder(section: dict[str, Any], folder: Path) -> TimmEncoder:
    """The frozen encoder in a checkpoint's folder; float32, as timm makes it."""
    network = timm.create_model(section["name"], num_classes=0)
    network.load_state_dict(load_file(folder / "vision_encoder" / "model.safetensors"))
    return assemble_timm(network, SimpleNamespace(**section))
