"""From a config section to a vision encoder."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from frozenprefix.errors import ConfigError
from frozenprefix.models.encoder_configuration import FusedEncoderConfig, VisionEncoderConfig
from frozenprefix.models.vision.base import BuiltEncoder
from frozenprefix.models.vision.fused_encoder import join_encoders
from frozenprefix.models.vision.image_processing import show_whole_image
from frozenprefix.registry import Registry

VISION_SOURCES: Registry[Callable[[Any], BuiltEncoder]] = Registry(
    "vision encoder source",
    {
        "timm": "frozenprefix.models.vision.timm_encoder:build",
        "open_clip": "frozenprefix.models.vision.open_clip_encoder:build",
        "transformers": "frozenprefix.models.vision.transformers_encoder:build",
        "features": "frozenprefix.models.vision.precomputed:build",
    },
    group="frozenprefix.vision_encoders",
)
"""Builders of single encoders, functions from a config section to a `BuiltEncoder`; "fused" joins several encoders.

An encoder of your own is found by an entry point of the group `frozenprefix.vision_encoders`, or as
`source: package.module:function` if `allow_code` was called. Its section is a `CustomEncoderConfig`.
"""


SAVERS: dict[str, str] = {
    "timm": "frozenprefix.models.vision.timm_encoder:save_timm",
    "open_clip": "frozenprefix.models.vision.open_clip_encoder:save_open_clip_visual",
    "transformers": "frozenprefix.models.vision.transformers_encoder:save_transformers",
}
"""Functions (config section, folder) -> the section's fields that name the copy, for encoders that can be written."""


def save_vision_encoder(config: VisionEncoderConfig | None, folder: Path) -> VisionEncoderConfig:
    """Write the frozen weights that `config` names into a folder, as the library itself does.

    Returns:
        The section that names the copy.

    Raises:
        ConfigError: for encoders that cannot be written.

    Example:
        >>> section = save_vision_encoder(model.config.vision_encoder, tmp_path / "encoder")
        >>> section.weights == str(tmp_path / "encoder" / "model.safetensors")
        True
    """
    source = None if config is None else config.source
    if config is None or source not in SAVERS:
        known = ", ".join(map(repr, SAVERS))
        raise ConfigError(
            f"self_contained: a vision encoder of source {source!r} cannot be written into a checkpoint; it can for "
            f"{known}"
        )
    module, name = SAVERS[source].split(":")
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("cpu"):
        fields = getattr(import_module(module), name)(config, folder)
    return config.model_copy(update=fields)


def read_identity(config: VisionEncoderConfig) -> dict[str, str]:
    """The identity that `build_vision_encoder` gives the encoder of a section."""
    with torch.device("cpu"):
        return VISION_SOURCES.get(config.source)(config).identity


def build_vision_encoder(config: VisionEncoderConfig) -> BuiltEncoder:
    """Build the vision encoder that `config` describes, in evaluation mode, on the CPU, without gradients.

    Returns:
        The module (in `config.dtype`; in float32 if it is trained), an image processor of transformers, and the
        identity of the weights: strings "source", "name", and what names the weights exactly ("weights" and "sha256",
        or a Hub "revision").

    Raises:
        ConfigError: for options that do not fit the network.
        AssetError: for weights that cannot be loaded or do not fit.

    Example:
        >>> from frozenprefix.models.encoder_configuration import vision_encoder_config
        >>> config = vision_encoder_config(source="timm", name="resnet10t", weights="random", image_size=32)
        >>> built = build_vision_encoder(config)
        >>> built.module(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 1, 512])
    """
    # transformers' from_pretrained sets the meta device, on which the weights would be lost.
    with torch.device("cpu"):
        if isinstance(config, FusedEncoderConfig):
            built = join_encoders(config, [build_vision_encoder(part) for part in config.configs()])
        else:
            built = VISION_SOURCES.get(config.source)(config)
            if config.resize == "squash":
                show_whole_image(built.image_processor, built.module.image_size)
    # A trained encoder keeps float32 weights, and computes in the shorter type by autocast.
    dtype = torch.float32 if config.trainable != "none" else getattr(torch, config.dtype)
    built.module.to(dtype).eval().requires_grad_(False)
    return built
