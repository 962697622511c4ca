"""Which options of a vision encoder go together; checked when a recipe is read, and again when the encoder is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from frozenprefix.models.configuration import VisionEncoderConfig

_LIBRARY_FIELDS = ("weights", "revision", "layer")
_IMAGE_FIELDS = ("output", "grid", "image_size", "resize")
_NO_EFFECT = {
    "fused": (*_LIBRARY_FIELDS, "peft", "path", "keys"),
    "features": (*_LIBRARY_FIELDS, *_IMAGE_FIELDS, "trainable", "peft", "encoders"),
}
_NO_EFFECT_ELSEWHERE = ("encoders", "path", "keys")


def encoder_problems(config: VisionEncoderConfig) -> list[str]:
    """Options that are missing, contradict each other, or could have no effect: one line each, the field first."""
    problems = [_without_effect(config, name) for name in _NO_EFFECT.get(config.source, _NO_EFFECT_ELSEWHERE)]
    if config.source == "fused":
        problems.append(_check_parts(config))
    if config.source == "features" and not config.path:
        problems.append("path is missing: source 'features' reads a .safetensors or .npy file")
    if config.peft is not None and config.trainable != "none":
        problems.append("peft trains layers of its own around frozen ones; expected 'none' for trainable beside it")
    if config.layer == []:
        problems.append("layer must name at least one layer, got an empty list")
    if config.output == "pooled":
        problems += _check_pooled(config)
    if config.source in ("timm", "open_clip") and config.revision is not None:
        problems.append(
            f"revision '{config.revision}' has no effect with source '{config.source}', only with 'transformers'"
        )
    return [problem for problem in problems if problem]


def _without_effect(config: VisionEncoderConfig, name: str) -> str:
    value = getattr(config, name)
    if value == type(config).model_fields[name].default:
        return ""
    hint = "give it to the part it belongs to" if config.source == "fused" and name in _LIBRARY_FIELDS else "remove it"
    return f"{name} {value!r} has no effect with source '{config.source}'; {hint}"


def _check_parts(config: VisionEncoderConfig) -> str:
    count = len(config.encoders or [])
    return "" if count > 1 else f"encoders must list at least two encoders for source 'fused', got {count}"


def _check_pooled(config: VisionEncoderConfig) -> list[str]:
    problems = []
    if config.grid is not None:
        problems.append(f"grid {config.grid} has no effect with output 'pooled'; remove it, or use output 'patch'")
    layers = [("layer", config.layer)]
    layers += [(f"encoders.{i}.layer", part.layer) for i, part in enumerate(config.encoders or [])]
    problems += [
        f"{name} {layer} has no effect with output 'pooled', which the library takes from its last "
        "layer; remove it, or use output 'patch'"
        for name, layer in layers
        if layer not in (-1, [-1], [])
    ]
    return problems
