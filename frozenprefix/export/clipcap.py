"""Checkpoints of ClipCap (Mokady et al. 2021), as its training script writes them, become this package's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from frozenprefix.errors import AssetError, ConfigError
from frozenprefix.export.assemble import build_encoder, read_state, save_imported
from frozenprefix.models.configuration import LanguageModelConfig, MapperConfig
from frozenprefix.models.language_model import load_language_model
from frozenprefix.models.language_model.base import word_embeddings
from frozenprefix.models.language_model.loading import load_tokenizer
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration

_MAPPER, _LM = "clip_project.", "gpt."
_HEADS = 8  # of the transformer, in ClipCap's code
# the encoders of ClipCap's published features, by their width
_ENCODERS = {
    512: {"source": "open_clip", "name": "ViT-B-32-quickgelu", "weights": "openai", "output": "pooled"},
    640: {"source": "open_clip", "name": "RN50x4-quickgelu", "weights": "openai", "output": "pooled"},
}
_BUFFERS = re.compile(r"\.attn\.(masked_)?bias$")  # causal masks that older versions of transformers saved


def import_clipcap(
    file: str | Path,
    out: str | Path,
    *,
    vision_encoder: Mapping[str, Any] | None = None,
    language_model: str = "gpt2",
    unit_features: bool = False,
) -> FrozenPrefixForConditionalGeneration:
    """Write a ClipCap checkpoint as one of this package, and return the model.

    MLP and transformer mappers of any prefix length are read. Weights of GPT-2 in the file that differ from those of
    `language_model` were fine-tuned: they become the checkpoint's own language model. ClipCap learns no end token, so
    captions end with ".", as in its own script.

    Args:
        file: a state dict by `torch.save`, with `clip_project.*` and, if it was saved whole, `gpt.*`.
        out: folder to write.
        vision_encoder: section of the encoder; by default OpenAI's CLIP ViT-B/32 for 512 features, RN50x4 for 640.
        language_model: the GPT-2 that the training began with: Hub id or folder. It gives tokenizer and sizes.
        unit_features: whether it was trained with `--normalize_prefix`.

    Raises:
        AssetError: for a file that is no such state dict; it is never unpickled.
        ConfigError: naming the dimension that does not fit encoder or language model.

    Example:
        >>> torch.save({"weight": torch.ones(1)}, tmp_path / "foreign.pt")
        >>> import_clipcap(tmp_path / "foreign.pt", tmp_path / "out")
        Traceback (most recent call last):
        frozenprefix.errors.AssetError: foreign.pt holds no mapper of ClipCap (no clip_project.*); ...
    """
    state = read_state(file)
    name = Path(file).name
    mapper_state = {key.removeprefix(_MAPPER): value.float() for key, value in state.items() if key.startswith(_MAPPER)}
    if not mapper_state:
        raise AssetError(f"{name} holds no mapper of ClipCap (no {_MAPPER}*); give the .pt file of its training")
    lm_config = LanguageModelConfig(path=language_model)
    lm, _ = load_language_model(lm_config)
    width = word_embeddings(lm).weight.shape[1]
    mapper, tensors, features = read_mapper(mapper_state, width, name)
    if vision_encoder is None and features not in _ENCODERS:
        raise ConfigError(
            f"{name}: its mapper reads {features} features, expected 512 (ViT-B/32) or 640 (RN50x4); name the encoder "
            "with --vision-encoder"
        )
    encoder = build_encoder(vision_encoder or _ENCODERS[features])
    got = encoder[1].module
    if (got.encoder_dim, got.num_tokens) != (features, 1):
        raise ConfigError(
            f"{name}: its mapper reads 1 vector of {features} features, but encoder '{got.name}' gives "
            f"{got.num_tokens} of {got.encoder_dim}; give the encoder of the training, with output=pooled"
        )
    own = _fine_tuned(lm, {key.removeprefix(_LM): value for key, value in state.items() if key.startswith(_LM)}, name)
    tokenizer = load_tokenizer(lm_config)
    return save_imported(
        out,
        encoder=encoder,
        mapper=mapper,
        tensors=tensors,
        language_model=lm_config,
        tokenizer=tokenizer,
        own_language_model=own,
        end_tokens=tokenizer(".", add_special_tokens=False)["input_ids"][-1:],
        unit_features=unit_features,
    )


def read_mapper(state: Mapping[str, Tensor], lm_dim: int, name: str) -> tuple[MapperConfig, dict[str, Tensor], int]:
    """Options, tensors by the names here, and number of features, of a mapper's state dict.

    Args:
        state: without `clip_project.` in front.
        lm_dim: width of GPT-2.
        name: of the file, for messages.

    Raises:
        AssetError: for other tensors than those of ClipCap's two mappers.
        ConfigError: naming the tensor whose width is not that of the language model.

    Example:
        >>> weights = {f"model.{n}.weight": torch.zeros(32, 32) for n in (0, 2)}
        >>> state = {**weights, **{f"model.{n}.bias": torch.zeros(32) for n in (0, 2)}}
        >>> config, _, features = read_mapper(state, lm_dim=16, name="a.pt")
        >>> config.prefix_length, config.options["hidden_dim"], features
        (2, 32, 32)
    """
    try:
        return _read_transformer(state, lm_dim, name) if "prefix_const" in state else _read_mlp(state, lm_dim, name)
    except (KeyError, IndexError) as error:
        raise AssetError(
            f"{name}: its clip_project.* are neither ClipCap's MLP nor its transformer (missing {error}); give the .pt "
            "file of its training"
        ) from error


def _read_mlp(state: Mapping[str, Tensor], lm_dim: int, name: str) -> tuple[MapperConfig, dict[str, Tensor], int]:
    numbers = sorted(int(key.split(".")[1]) for key in state if re.fullmatch(r"model\.\d+\.weight", key))
    first, last = state[f"model.{numbers[0]}.weight"], state[f"model.{numbers[-1]}.weight"]
    length = _whole(last.shape[0], lm_dim, f"{name}: clip_project.model.{numbers[-1]}.weight")
    options: dict[str, Any] = {"num_layers": len(numbers)}
    if len(numbers) > 1:
        options["hidden_dim"] = first.shape[0]
    tensors = {}
    for layer, number in enumerate(numbers):
        for part in ("weight", "bias"):
            tensors[f"layers.{3 * layer}.{part}"] = state[f"model.{number}.{part}"]
    config = MapperConfig(type="mlp", prefix_length=length, output_norm="none", **options)
    return config, tensors, first.shape[1]


def _read_transformer(
    state: Mapping[str, Tensor], lm_dim: int, name: str
) -> tuple[MapperConfig, dict[str, Tensor], int]:
    length, width = state["prefix_const"].shape
    if width != lm_dim:
        raise ConfigError(
            f"{name}: clip_project.prefix_const has width {width}, expected {lm_dim}, that of the language model; "
            "give the GPT-2 of the training as --language-model"
        )
    visual = _whole(state["linear.weight"].shape[0], lm_dim, f"{name}: clip_project.linear.weight")
    count = len({key.split(".")[2] for key in state if key.startswith("transformer.layers.")})
    names = {
        **{"norm1": "norm_attention", "norm2": "norm_feed_forward"},
        **{"attn.to_queries": "attention.to_q", "attn.to_keys_values": "attention.to_kv"},
        **{"attn.project": "attention.to_out", "mlp.fc1": "feed_forward.0", "mlp.fc2": "feed_forward.3"},
    }
    tensors = {"project_in.weight": state["linear.weight"], "project_in.bias": state["linear.bias"]}
    tensors["prefix_queries"] = state["prefix_const"]
    for layer in range(count):
        for theirs, own in names.items():
            for part in ("weight",) if theirs.startswith("attn.to") else ("weight", "bias"):
                tensors[f"layers.{layer}.{own}.{part}"] = state[f"transformer.layers.{layer}.{theirs}.{part}"]
    config = MapperConfig(
        type="transformer",
        prefix_length=length,
        output_norm="none",
        num_layers=count,
        num_heads=_HEADS,
        ratio=state["transformer.layers.0.mlp.fc1.weight"].shape[0] / lm_dim,
        visual_length=visual,
    )
    return config, tensors, state["linear.weight"].shape[1]


def _whole(rows: int, lm_dim: int, what: str) -> int:
    """How many embeddings a layer with `rows` outputs makes."""
    if rows % lm_dim or not rows:
        raise ConfigError(
            f"{what} makes {rows} numbers, expected a multiple of {lm_dim}, the width of the language model; give the "
            "GPT-2 of the training as --language-model"
        )
    return rows // lm_dim


@torch.no_grad()
def _fine_tuned(lm: PreTrainedModel, state: dict[str, Tensor], name: str) -> PreTrainedModel | None:
    """The language model with the file's weights, if they are not its own; None for a frozen one."""
    state = {key: value for key, value in state.items() if not _BUFFERS.search(key)}
    if not state:
        return None
    own = lm.state_dict()
    state.setdefault("lm_head.weight", state.get("transformer.wte.weight", torch.zeros(0)))
    unknown = sorted(state.keys() ^ own.keys())
    if unknown:
        raise AssetError(f"{name}: its gpt.* are not those of a GPT-2 of transformers ({', '.join(unknown[:3])})")
    for key, tensor in own.items():
        if tensor.shape != state[key].shape:
            raise ConfigError(
                f"{name}: gpt.{key} has shape {tuple(state[key].shape)}, expected {tuple(tensor.shape)} of "
                "--language-model; give the GPT-2 of the training"
            )
    if all(torch.equal(tensor, state[key].to(tensor)) for key, tensor in own.items()):
        return None
    lm.load_state_dict(state)
    return lm
