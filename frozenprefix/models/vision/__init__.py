"""Vision encoders: images → image features, from timm, open_clip or transformers, or given as files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from frozenprefix.models.configuration import VisionEncoderConfig
from frozenprefix.models.vision.base import BuiltEncoder, VisionEncoder
from frozenprefix.models.vision.image_processing import FrozenPrefixImageProcessor, show_whole_image
from frozenprefix.registry import Registry

__all__ = ["VISION_SOURCES", "BuiltEncoder", "FrozenPrefixImageProcessor", "VisionEncoder", "build_vision_encoder"]

VISION_SOURCES: Registry[Callable[[Any], BuiltEncoder]] = Registry(
    "vision encoder source",
    {
        "timm": "frozenprefix.models.vision.timm_encoder:build",
        "open_clip": "frozenprefix.models.vision.open_clip_encoder:build",
        "transformers": "frozenprefix.models.vision.transformers_encoder:build",
        "fused": "frozenprefix.models.vision.fused_encoder:build",
        "features": "frozenprefix.models.vision.precomputed:build",
    },
)


def build_vision_encoder(config: VisionEncoderConfig) -> BuiltEncoder:
    """Build the vision encoder that `config` describes, in evaluation mode, on the CPU, without gradients.

    Returns:
        The module (in `config.dtype`), a transformers image processor, and the weights' identity: a dict of strings
        with "source", "name", and what names the weights exactly ("weights" and "sha256", or a Hub "revision").

    Raises:
        ConfigError: for options that do not fit the network.
        AssetError: for weights that cannot be had or do not fit.
    """
    # A surrounding meta device, as transformers sets one in from_pretrained, must not swallow the weights.
    with torch.device("cpu"):
        built = VISION_SOURCES.get(config.source)(config)
    if config.resize == "squash" and config.source != "fused":  # whose parts have done so
        show_whole_image(built.image_processor, built.module.image_size)
    # A trained encoder keeps every bit of its weights: it computes in the shorter type by autocast.
    dtype = torch.float32 if config.trainable != "none" else getattr(torch, config.dtype)
    built.module.to(dtype).eval().requires_grad_(False)
    return built
