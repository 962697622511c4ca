"""Projectors of LLaVA and nanoVLM, whose files are state dicts with known names, become checkpoints of this package."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frozenprefix.errors import AssetError, ConfigError
from frozenprefix.export.assemble import build_encoder, read_state, save_imported
from frozenprefix.models.configuration import LanguageModelConfig, MapperConfig
from frozenprefix.models.language_model.loading import language_model_config, load_tokenizer
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.vision import VisionEncoder

_LLAVA = "mm_projector."
_NANOVLM = "MP.proj.weight"


def import_llava(
    file: str | Path, out: str | Path, *, vision_encoder: Mapping[str, Any], language_model: str
) -> FrozenPrefixForConditionalGeneration:
    """Write LLaVA's `mm_projector.bin` (linear, or `mlp2x_gelu`) with its encoder and language model as a checkpoint.

    Args:
        file: state dict with `model.mm_projector.*`.
        vision_encoder: section of the encoder, with the layer that was read: -2 for LLaVA-1.5.
        language_model: Hub id or folder of the language model that the projector was trained for.

    Raises:
        AssetError: for a file that is no such state dict.
        ConfigError: naming the dimension that does not fit.

    Example:
        >>> torch.save({"weight": torch.ones(1)}, tmp_path / "mm_projector.bin")
        >>> import_llava(tmp_path / "mm_projector.bin", tmp_path / "out", vision_encoder={}, language_model="")
        Traceback (most recent call last):
        frozenprefix.errors.AssetError: mm_projector.bin holds no projector of LLaVA (no mm_projector.*); ...
    """
    name = Path(file).name
    found = {key.partition(_LLAVA)[2]: value.float() for key, value in read_state(file).items() if _LLAVA in key}
    layers = sorted({int(key.split(".")[0]) for key in found if key.split(".")[0].isdigit()})
    if not found or not (layers in ([0, 2], [0, 2, 4]) or found.keys() == {"weight", "bias"}):
        what = (
            "has layers of another kind than linear and GELU"
            if found
            else f"holds no projector of LLaVA (no {_LLAVA}*)"
        )
        raise AssetError(f"{name} {what}; give the mm_projector.bin of a LLaVA with a linear or an MLP projector")
    if layers:
        parts = {number: [found.get(f"{number}.{part}") for part in ("weight", "bias")] for number in layers}
    else:
        parts = {0: [found["weight"], found["bias"]]}
    _check_parts(parts, name)
    weights: list[Any] = [weight for weight, _ in parts.values()]

    def mapper(encoder: VisionEncoder, lm_dim: int) -> tuple[MapperConfig, dict[str, Tensor]]:
        _check_widths(name, weights[0].shape[1], encoder.encoder_dim, weights[-1].shape[0], lm_dim)
        options: dict[str, Any] = {"num_layers": len(parts)}
        if len(parts) > 1:
            options |= {"activation": "gelu", "hidden_dim": weights[0].shape[0]}
        config = MapperConfig(type="mlp", prefix_length=encoder.num_tokens, output_norm="none", **options)
        rows = [(f"layers.{3 * place}", pair) for place, pair in enumerate(parts.values())]
        return config, {f"{row}.{part}": pair[i] for row, pair in rows for i, part in enumerate(("weight", "bias"))}  # type: ignore[misc]

    return _save(out, mapper, vision_encoder, language_model)


def import_nanovlm(
    file: str | Path, out: str | Path, *, vision_encoder: Mapping[str, Any], language_model: str
) -> FrozenPrefixForConditionalGeneration:
    """Write nanoVLM's modality projector (pixel shuffle, linear without bias) as a checkpoint.

    nanoVLM trains encoder and language model too: give folders with its trained ones.

    Args:
        file: its `model.safetensors`, or a state dict with `MP.proj.weight`.
        vision_encoder: section of the encoder, with patch features.
        language_model: Hub id or folder.

    Raises:
        AssetError: for a file without that tensor.
        ConfigError: naming the dimension that does not fit.

    Example:
        >>> torch.save({"weight": torch.ones(1)}, tmp_path / "nano.pt")
        >>> import_nanovlm(tmp_path / "nano.pt", tmp_path / "out", vision_encoder={}, language_model="")
        Traceback (most recent call last):
        frozenprefix.errors.AssetError: nano.pt holds no projector of nanoVLM (no MP.proj.weight); ...
    """
    name = Path(file).name
    weight = read_state(file).get(_NANOVLM)
    if weight is None or weight.ndim != 2:
        raise AssetError(f"{name} holds no projector of nanoVLM (no {_NANOVLM}); give its model.safetensors")

    def mapper(encoder: VisionEncoder, lm_dim: int) -> tuple[MapperConfig, dict[str, Tensor]]:
        shuffle = isqrt(max(1, weight.shape[1] // encoder.encoder_dim))
        _check_widths(name, weight.shape[1], shuffle**2 * encoder.encoder_dim, weight.shape[0], lm_dim)
        length = encoder.num_tokens // shuffle**2
        options: dict[str, Any] = {"shuffle": shuffle, "num_layers": 1}
        config = MapperConfig(type="pixel_shuffle", prefix_length=length, output_norm="none", **options)
        return config, {"layers.0.weight": weight.float(), "layers.0.bias": torch.zeros(weight.shape[0])}

    return _save(out, mapper, vision_encoder, language_model)


def _check_parts(parts: Mapping[int, list[Tensor | None]], name: str) -> None:
    """Refuse layers without weight or bias, or of widths that do not follow each other."""
    width = None
    for number, (weight, bias) in parts.items():
        if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise AssetError(f"{name}: layer {number} of its projector lacks weight or bias; fetch the file again")
        if width not in (None, weight.shape[1]):
            raise AssetError(
                f"{name}: layer {number} of its projector reads {weight.shape[1]} numbers, expected {width}"
            )
        width = weight.shape[0]


def _check_widths(name: str, reads: int, features: int, makes: int, lm_dim: int) -> None:
    problems = []
    if reads != features:
        problems.append(f"{name}: its projector reads {reads} numbers, but the encoder gives {features}")
    if makes != lm_dim:
        problems.append(f"{name}: its projector makes {makes} numbers, but the language model has width {lm_dim}")
    if problems:
        raise ConfigError([f"{problem}; give the parts of its training" for problem in problems])


def _save(out: str | Path, mapper: Any, vision_encoder: Mapping[str, Any], language_model: str) -> Any:
    lm_config = LanguageModelConfig(path=language_model)
    lm_dim = language_model_config(lm_config).get_text_config().hidden_size
    encoder = build_encoder(vision_encoder)
    config, tensors = mapper(encoder[1].module, lm_dim)
    return save_imported(
        out,
        encoder=encoder,
        mapper=config,
        tensors=tensors,
        language_model=lm_config,
        tokenizer=load_tokenizer(lm_config),
    )
