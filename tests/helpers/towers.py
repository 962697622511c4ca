"""Tiny random image encoders in folders of transformers, and checkpoints with them that other engines can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZE, TOKENS = 32, 16


def save_tower(folder: Path, kind: str, activation: str) -> Path:
    """A vision model of transformers, "siglip" or "clip", of 32 x 32 pixels and 16 patches."""
    import torch
    import transformers as t

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
        "hidden_act": activation,
    }
    torch.manual_seed(1)
    if kind == "siglip":
        model: Any = t.SiglipVisionModel(t.SiglipVisionConfig(**sizes))
        processor: Any = t.SiglipImageProcessor(size={"height": SIZE, "width": SIZE})
    else:
        model = t.CLIPVisionModel(t.CLIPVisionConfig(**sizes))
        square = {"height": SIZE, "width": SIZE}
        processor = t.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=square)
    with torch.no_grad():
        for parameter in model.parameters():  # far from their starts, biases and norms too
            parameter.normal_(0.3 if parameter.ndim == 1 else 0.0, 0.3 if parameter.ndim == 1 else 0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_checkpoint(recipe: dict[str, Any], tower: Path, folder: Path, *, layer: int = -1, **mapper: Any) -> Path:
    """An untrained checkpoint of `recipe` (see `tiny_recipe_dict`) with this tower, and a mapper without output norm.

    Its prefix embeddings have a size of about 0.5.
    """
    import torch

    from frozenprefix.config import recipe_from_dict
    from frozenprefix.training.setup import build_model

    recipe["model"]["vision_encoder"] = {"source": "transformers", "name": str(tower), "layer": layer}
    recipe["model"]["mapper"] = {"type": "mlp", "prefix_length": TOKENS, "output_norm": "none", **mapper}
    model, processor = build_model(recipe_from_dict(recipe))
    with torch.no_grad():
        size = model.prefix(torch.randn(4, 3, SIZE, SIZE)).square().mean().sqrt()
        has_norm = len(list(model.mapper.scale.parameters())) > 0
        for parameter in (model.mapper.scale if has_norm else model.mapper.body.output_layer).parameters():
            parameter *= 0.5 / size
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
