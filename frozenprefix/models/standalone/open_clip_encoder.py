"""Loading an image tower of open_clip in the code of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
from safetensors.torch import load_file

from frozenprefix.models.vision.open_clip_encoder import OpenClipEncoder, assemble_open_clip


def load_encoder(section: dict[str, Any], folder: Path) -> OpenClipEncoder:
    """The frozen encoder in a checkpoint's folder; float32, as open_clip makes it."""
    tower: Any = open_clip.create_model(section["name"], force_image_size=section["image_size"]).visual
    tower.load_state_dict(load_file(folder / "vision_encoder" / "model.safetensors"))
    return assemble_open_clip(tower, SimpleNamespace(**section))
