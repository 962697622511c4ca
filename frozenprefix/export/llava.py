"""A checkpoint in the layout of transformers' Llava classes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
)

from frozenprefix.errors import ExportError
from frozenprefix.export.source import Source
from frozenprefix.export.vit import PlainViT
from frozenprefix.models.language_model.base import word_embeddings
from frozenprefix.models.processing import IMAGE_TOKEN
from frozenprefix.models.vision.image_processing import FrozenPrefixImageProcessor
from frozenprefix.utils import atomic_folder

_NORMED_SINCE = "transformers 5.18"
_ACTIVATIONS = {"erf": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu", "any": "gelu"}


def export_llava(source: Source, out: str | Path) -> Path:
    """Write a folder that `LlavaForConditionalGeneration` and `LlavaProcessor` load, in float32.

    The word embeddings get rows for `<image>`, which no text is generated from (`suppress_tokens`).

    Raises:
        ExportError: for an encoder, a mapper or a language model that Llava does not have.

    Example:
        >>> export_llava(Source(checkpoint, model, processor), tmp_path / "llava")
        Traceback (most recent call last):
        frozenprefix.errors.ExportError: model.mapper.output_norm: got 'layer', a layer norm ...
    """
    mlp, vit = source.mlp(), source.vit()
    lm: Any = source.model.language_model
    _check_language_model(lm)
    if mlp.norms is not None:
        raise ExportError(
            "model.mapper.hidden_norm: got true, but Llava's projector has no layer norms; use "
            "`frozenprefix export gguf`, or train with hidden_norm=false and output_norm=none"
        )
    if mlp.hidden > source.model.lm.dim:
        raise ExportError(
            f"model.mapper.hidden_dim: a mapper with {mlp.hidden} hidden units, but Llava's has the width of the "
            f"language model, {source.model.lm.dim}; train with at most that, or use `frozenprefix export gguf`"
        )
    mlp = mlp.widened(source.model.lm.dim)
    config: Any = _config(source, vit, _ACTIVATIONS[mlp.gelu])
    model: Any = LlavaForConditionalGeneration(config).eval()
    projector = model.model.multi_modal_projector
    projector.load_state_dict(
        {
            **{"linear_1.weight": mlp.up, "linear_1.bias": mlp.up_bias},
            **{"linear_2.weight": mlp.down, "linear_2.bias": mlp.down_bias},
        }
    )
    load_tower(model.model.vision_tower, vision_state(vit))
    _check_normed(model.model.vision_tower, vit)
    rows = config.text_config.vocab_size
    text = {name: _with_rows(name, tensor, rows) for name, tensor in lm.base_model.state_dict().items()}
    model.model.language_model.load_state_dict(text)
    model.lm_head.weight.data.copy_(_with_rows("lm_head.weight", lm.get_output_embeddings().weight, rows))
    model.generation_config = copy.deepcopy(source.model.generation_config)
    model.generation_config.update(eos_token_id=source.end_tokens, suppress_tokens=[source.processor.image_token_id])
    processor = _processor(source, vit)
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return Path(out)


def _check_language_model(lm: Any) -> None:
    words = word_embeddings(lm)
    if type(words) is not nn.Embedding or lm.config.is_encoder_decoder or lm.get_output_embeddings().bias is not None:
        raise ExportError(
            f"model.language_model: {type(lm).__name__} has no place in Llava; expected a decoder of the LLaMA family, "
            "with plain word embeddings and a head without bias"
        )


def _config(source: Source, vit: PlainViT, projector_act: str) -> LlavaConfig:
    lm: Any = source.model.language_model
    text = copy.deepcopy(lm.config)
    text.vocab_size = max(word_embeddings(lm).num_embeddings, source.processor.image_token_id + 1)
    shared: dict[str, Any] = {
        "hidden_size": vit.width,
        "intermediate_size": vit.inner,
        "num_attention_heads": vit.heads,
        "image_size": vit.image_size,
        "patch_size": vit.patch_size,
        "layer_norm_eps": vit.eps,
        "hidden_act": _ACTIVATIONS[vit.gelu],
        # one more does nothing: the state that is read is then not the last of all, which releases treat differently
        "num_hidden_layers": vit.blocks if vit.normed else vit.blocks + 1,
    }
    if vit.has_class_token:
        vision: Any = CLIPVisionConfig(**shared)
    else:
        # hidden_states[-1] is then what the encoder returns, after its last layer norm
        shared |= {"vision_use_head": False, "tie_last_hidden_states": vit.normed}
        vision = SiglipVisionConfig(**shared)
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=source.processor.image_token_id,
        projector_hidden_act=projector_act,
        vision_feature_select_strategy="default" if vit.has_class_token else "full",
        vision_feature_layer=-1 if vit.normed else -2,
        image_seq_length=source.model.config.prefix_length,
        tie_word_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
    )


def vision_state(vit: PlainViT) -> dict[str, Tensor]:
    """Tensors by the names of `SiglipVisionModel` and `CLIPVisionModel`, without `vision_model.` in front."""
    names = {
        **{"patch.weight": "embeddings.patch_embedding.weight", "patch.bias": "embeddings.patch_embedding.bias"},
        **{"position": "embeddings.position_embedding.weight", "class": "embeddings.class_embedding"},
        **{f"pre_norm.{part}": f"pre_layrnorm.{part}" for part in ("weight", "bias")},
        **{f"post_norm.{part}": f"post_layernorm.{part}" for part in ("weight", "bias")},
    }
    state = {names[name]: tensor for name, tensor in vit.tensors.items() if name in names}
    inside = {
        **{"norm1": "layer_norm1", "norm2": "layer_norm2", "up": "mlp.fc1", "down": "mlp.fc2"},
        **{one: f"self_attn.{one}_proj" for one in ("q", "k", "v", "out")},
    }
    for number in range(vit.blocks):
        for own, theirs in inside.items():
            for part in ("weight", "bias"):
                tensor = vit.tensors[f"blocks.{number}.{own}.{part}"]
                state[f"encoder.layers.{number}.{theirs}.{part}"] = tensor
    return state


def load_tower(tower: Any, state: dict[str, Tensor]) -> None:
    """Copy tensors into a vision tower; what it has beyond them (a block, a norm) does nothing or is not read.

    Raises:
        ExportError: for a tensor that the tower has no place for.
    """
    own = {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
    extra = sorted(set(state) - set(own))
    if extra:
        raise ExportError(
            f"model.vision_encoder: {', '.join(extra[:3])} have no place in transformers' {type(tower).__name__}; use "
            "`frozenprefix export gguf` or `frozenprefix export embeds`"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state.get(name, torch.ones(1) if "norm.weight" in name else torch.zeros(1)))


@torch.no_grad()
def _check_normed(tower: Any, vit: PlainViT) -> None:
    """Refuse features that this release of transformers does not let Llava read.

    Raises:
        ExportError: the last hidden state is given without the layer norm behind it.
    """
    if not vit.normed:
        return
    out = tower(torch.zeros(1, 3, vit.image_size, vit.image_size), output_hidden_states=True)
    if not torch.equal(out.hidden_states[-1], out.last_hidden_state):
        raise ExportError(
            "model.vision_encoder.layer: got -1, the features behind the last layer norm, which Llava reads with "
            f"{_NORMED_SINCE} or later; install it, or train with layer=-2"
        )


def _with_rows(name: str, tensor: Tensor, rows: int) -> Tensor:
    """Word embeddings and head with rows of zeros up to the size of the vocabulary."""
    if not name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return tensor
    return nn.functional.pad(tensor.detach(), (0, 0, 0, rows - tensor.shape[0]))


def _processor(source: Source, vit: PlainViT) -> LlavaProcessor:
    images: Any = source.processor.image_processor
    if isinstance(images, FrozenPrefixImageProcessor):
        keys = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
        images = CLIPImageProcessor(
            size=dict(images.size),
            crop_size=dict(images.crop_size),
            resample=images.resample,
            image_mean=list(images.image_mean),
            image_std=list(images.image_std),
            **{key: getattr(images, key) for key in keys},
        )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=source.processor.tokenizer,
        patch_size=vit.patch_size,
        vision_feature_select_strategy="default" if vit.has_class_token else "full",
        num_additional_image_tokens=int(vit.has_class_token),
        image_token=IMAGE_TOKEN,
        chat_template=None,
    )
