"""From a config section to a vision encoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch

from frozenprefix.errors import ConfigError
from frozenprefix.models.encoder_configuration import CustomEncoderConfig, FusedEncoderConfig, VisionEncoderConfig
from frozenprefix.models.options import option_problems
from frozenprefix.models.vision.base import BuiltEncoder
from frozenprefix.models.vision.fused_encoder import join_encoders
from frozenprefix.models.vision.image_processing import show_whole_image
from frozenprefix.models.vision.own_encoder import build_own
from frozenprefix.registry import Registry

E = TypeVar("E", bound=Callable[..., Any])
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

An encoder of your own is registered by `@register_vision_encoder("name")` or by an entry point of the group
`frozenprefix.vision_encoders`, or named as `source: package.module:Class` if `allow_code` was called. Its section is a
`CustomEncoderConfig`.
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
            built = _build_single(config)
            if config.resize == "squash":
                show_whole_image(built.image_processor, built.module.image_size)
    # A trained encoder keeps float32 weights, and computes in the shorter type by autocast.
    dtype = torch.float32 if config.trainable != "none" else getattr(torch, config.dtype)
    built.module.to(dtype).eval().requires_grad_(False)
    return built


def _build_single(config: Any) -> BuiltEncoder:
    problems = validate_vision_encoder(config)
    if problems:
        raise ConfigError(problems)
    build: Any = VISION_SOURCES.get(config.source)
    is_class: bool = inspect.isclass(build)
    return build_own(config, build) if is_class else build(config)


def register_vision_encoder(name: str) -> Callable[[E], E]:
    """Decorator for an encoder of your own, which recipes then name: `vision_encoder: {source: NAME, …}`.

    It is put on an `nn.Module` class. The constructor takes options by keyword, which recipes are checked against, and
    loads the weights. `forward` maps pixel_values float[B, 3, H, W] to features float[B, D], float[B, N, D] or
    float[B, D, H', W']. Attributes say what pixels it reads: `image_size` (224 when not given; the recipe's
    `image_size` goes first), `image_mean` and `image_std` (0.5), or `image_processor`, one of transformers.

    The weights are frozen, and their SHA-256 is part of every checkpoint: the same options have to give the same
    weights each time. A function that takes the section of the recipe and returns a `BuiltEncoder` may be registered in
    place of a class.

    Raises:
        ConfigError: for a name that is taken.

    Example:
        >>> from torch import nn
        >>> @register_vision_encoder("averages")
        ... class Averages(nn.Module):
        ...     image_size = 32
        ...
        ...     def __init__(self, *, side: int = 8):
        ...         super().__init__()
        ...         self.pool = nn.AvgPool2d(side)
        ...
        ...     def forward(self, pixel_values):
        ...         return self.pool(pixel_values)
        >>> from frozenprefix.models.encoder_configuration import vision_encoder_config
        >>> encoder = build_vision_encoder(vision_encoder_config(source="averages", side=16)).module
        >>> encoder.num_tokens, encoder.encoder_dim
        (4, 3)
    """
    return VISION_SOURCES.register(name)


def validate_vision_encoder(config: Any) -> list[str]:
    """Check the options of an encoder from outside this package against its constructor; one line per problem.

    Sections of other encoders have no problems: they are checked when they are made.

    Example:
        >>> from frozenprefix.models.encoder_configuration import vision_encoder_config
        >>> validate_vision_encoder(vision_encoder_config(source="timm", name="resnet18"))
        []
    """
    if not isinstance(config, CustomEncoderConfig):
        return []
    try:
        encoder: Any = VISION_SOURCES.get(config.source)
    except ConfigError as error:
        return [f"model.vision_encoder.source: {problem}" for problem in error.problems]
    if not inspect.isclass(encoder):
        return []  # a function checks its section itself
    return option_problems(VISION_SOURCES, "model.vision_encoder", config.source, config.options, set())
