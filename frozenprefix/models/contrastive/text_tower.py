"""Text towers, which turn each text into one vector: any encoder of transformers, or an open_clip tower."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from frozenprefix.assets import is_pypi, resolve
from frozenprefix.errors import ConfigError
from frozenprefix.models.contrastive.configuration import TextTowerConfig
from frozenprefix.models.freezing import hash_tensors
from frozenprefix.models.pretrained import (
    check_folder,
    check_loaded,
    hub_commit,
    quiet_transformers,
    read_config,
    reading,
    report_unused,
)
from frozenprefix.models.vision.weights import network_error, seeded
from frozenprefix.utils import tree_sha256

_FIELD = "text_tower.path"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "config.json")


class TextTower(nn.Module):
    """A text encoder with pooling: one vector per text.

    Args:
        model: an encoder of transformers, or the text tower of an open_clip model, which pools and projects itself.
        config: its section.
        output_dim: size of the vectors.
    """

    def __init__(self, model: nn.Module, config: TextTowerConfig, output_dim: int):
        super().__init__()
        self.model = model
        self.pooling = None if config.source == "open_clip" else config.pooling
        self.output_dim = output_dim
        _freeze_below(model, config.trained_layers, config.path)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64[T, L] and int64[T, L] (0 on padding, either side) -> float[T, output_dim]."""
        if self.pooling is None:
            return self.model(input_ids)
        # [T, L] -> [T, L, D]
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.to(hidden.dtype)
        if self.pooling == "mean":
            return (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        weight = attention_mask.bool()
        if self.pooling == "cls":
            place = positions.masked_fill(~weight, hidden.shape[1]).amin(dim=1)
        else:
            place = positions.masked_fill(~weight, -1).amax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), place]


@dataclass(frozen=True)
class BuiltTextTower:
    """A text tower with its tokenizer and the identity of its weights.

    Attributes:
        tokenizer: a transformers tokenizer; None for open_clip, which finds its own by the tower's name.
        text_config: the architecture of a transformers model.
        scale, bias: log of the logit scale, and the logit bias, of an open_clip model.
    """

    module: TextTower
    tokenizer: PreTrainedTokenizerBase | None
    identity: dict[str, str]
    text_config: dict[str, Any] | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None


def build_text_tower(config: TextTowerConfig) -> BuiltTextTower:
    """Build the tower that `config` describes, in float32 on the CPU, with its lower layers frozen.

    Raises:
        ConfigError: for options that do not fit the tower.
        AssetError: for weights that cannot be loaded.
    """
    with torch.device("cpu"):
        return _build_open_clip(config) if config.source == "open_clip" else _build_transformers(config)


def text_tower_from_architecture(config: TextTowerConfig, text_config: dict[str, Any]) -> TextTower:
    """A transformers tower with random weights, for a checkpoint that holds all of its weights."""
    settings = AutoConfig.for_model(**text_config)
    with torch.device("cpu"):
        return TextTower(_encoder(AutoModel.from_config(settings)), config, int(settings.hidden_size))


def _build_transformers(config: TextTowerConfig) -> BuiltTextTower:
    place = _place(config)
    commit = None if Path(place).is_dir() else hub_commit(place, _FIELD, config.revision)
    with quiet_transformers(), reading(place, _FIELD, "a text encoder"):
        model, info = AutoModel.from_pretrained(
            place,
            revision=commit or "main",
            adapter_kwargs={"revision": commit or "main"},
            dtype=torch.float32,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(place, revision=commit or "main", trust_remote_code=False)
    # the pooler is not used, and often has no trained weights
    lost = {name for name in info["missing_keys"] if not name.startswith("pooler.")}
    check_loaded({**info, "missing_keys": lost}, place, _FIELD)
    report_unused(info, model, place, expected=True)
    hidden = getattr(model.config, "hidden_size", None)
    if hidden is None:
        raise ConfigError(f"text_tower.path: '{config.path}' ({model.config.model_type}) is no plain text encoder")
    identity = {"source": "transformers", "path": config.path if is_pypi(config.path) else Path(place).name}
    if commit is None:
        identity["sha256"] = tree_sha256(Path(place), _WEIGHTS)
    else:
        identity |= {"path": config.path, "revision": commit}
    _limit_length(tokenizer, model, config)
    tower = TextTower(_encoder(model), config, int(hidden))
    return BuiltTextTower(tower, tokenizer, identity, model.config.to_diff_dict())


def tower_config(config: TextTowerConfig) -> Any:
    """The transformers config of a text tower, without its weights.

    Raises:
        AssetError: it cannot be read.
    """
    return read_config(_place(config), _FIELD, config.revision)


def _place(config: TextTowerConfig) -> str:
    """The folder of a tower, checked, or its Hub id."""
    place = str(resolve(config.path)) if is_pypi(config.path) else str(Path(config.path).expanduser())
    if Path(place).is_dir():
        check_folder(Path(place), _FIELD)
    return place


def _encoder(model: Any) -> Any:
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # unused, and often without trained weights
    return model


def _limit_length(tokenizer: PreTrainedTokenizerBase, model: Any, config: TextTowerConfig) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and config.max_tokens > positions:
        raise ConfigError(
            f"text_tower.max_tokens: got {config.max_tokens}, expected at most the {positions} positions of "
            f"'{config.path}'"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = config.max_tokens


def _build_open_clip(config: TextTowerConfig) -> BuiltTextTower:
    import open_clip

    from frozenprefix.models.vision.open_clip_encoder import portable_name, resolve_open_clip_weights

    weights, identity = resolve_open_clip_weights(config.path, config.weights)
    try:
        with seeded():
            whole = open_clip.create_model(
                config.path, pretrained=weights, force_custom_text=True, pretrained_text=False, weights_only=True
            )
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise network_error("open_clip", config.path, error) from error
    model: Any = whole
    identity.setdefault("sha256", hash_tensors(model.text.state_dict()))
    model.text.output_tokens = False
    tower = TextTower(model.text, config, int(model.text.output_dim))
    identity = {"source": "open_clip", "path": portable_name(config.path), **identity}
    bias = None if model.logit_bias is None else model.logit_bias.detach()
    return BuiltTextTower(tower, None, identity, scale=model.logit_scale.detach(), bias=bias)


def _freeze_below(model: nn.Module, trained: int | str, name: str) -> None:
    """Freeze all but the last `trained` layers and the modules after them."""
    if trained == "all":
        return
    model.requires_grad_(False)
    if trained == 0:
        return
    lists = {key: module for key, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    path = max(lists, key=lambda key: len(lists[key]), default=None)
    count = 0 if path is None else len(lists[path])
    if path is None or int(trained) > count:
        raise ConfigError(f"text_tower.trained_layers: got {trained}, but '{name}' has {count} layers; expected fewer")
    for layer in lists[path][count - int(trained) :]:
        layer.requires_grad_(True)
    names = [key for key, _ in model.named_modules()]
    last = max(i for i, key in enumerate(names) if key == path or key.startswith(f"{path}."))
    for key in names[last + 1 :]:  # the final norm, and a projection
        model.get_submodule(key).requires_grad_(True)
    projection = getattr(model, "text_projection", None)
    if isinstance(projection, nn.Parameter):
        projection.requires_grad_(True)
