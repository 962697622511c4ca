"""Vision transformers of several libraries as one set of tensors, from which files for other engines are written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from frozenprefix.errors import ExportError
from frozenprefix.models.vision.base import FINAL, VisionEncoder
from frozenprefix.models.vision.timm_encoder import TimmEncoder
from frozenprefix.models.vision.transformers_encoder import TransformersEncoder

Gelu = Literal["erf", "tanh", "quick"]
_ACTIVATIONS: dict[str, Gelu] = {
    "gelu": "erf",
    "gelu_python": "erf",
    "gelu_pytorch_tanh": "tanh",
    "gelu_new": "tanh",
    "quick_gelu": "quick",
}
_CAN = (
    "what can be exported: SigLIP and CLIP towers of transformers, and timm's ViTs without class token (such as "
    "vit_base_patch16_siglip_224), with output=patch and one layer; every other encoder works with "
    "`frozenprefix export embeds` and `caption --engine llama.cpp`"
)
_BLOCK = ("norm1", "norm2", "q", "k", "v", "out", "up", "down")


@dataclass(frozen=True)
class PlainViT:
    """A vision transformer up to the features that are read.

    Attributes:
        width, heads, inner: of every block; blocks: how many are run; eps: of all layer norms.
        gelu: the activation of the blocks.
        image_size, patch_size: in pixels.
        normed: whether the layer norm behind all blocks is applied.
        tensors: float32, by name: `patch.weight` [D, 3, p, p], `patch.bias`, `position` [tokens, D], `class` [D],
            `pre_norm.*`, `post_norm.*`, and `blocks.N.{norm1,norm2,q,k,v,out,up,down}.{weight,bias}`.
    """

    width: int
    heads: int
    inner: int
    blocks: int
    eps: float
    gelu: Gelu
    image_size: int
    patch_size: int
    normed: bool
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def has_class_token(self) -> bool:
        return "class" in self.tensors


def plain_vit(encoder: VisionEncoder) -> PlainViT:
    """The tensors of an encoder.

    Raises:
        ExportError: naming what has no form in other engines, and what could be exported.

    Example:
        >>> plain_vit(model.vision_encoder)
        Traceback (most recent call last):
        frozenprefix.errors.ExportError: model.vision_encoder: 'test_vit' has a class token, ...
    """
    if encoder.pooled:
        raise _cannot("model.vision_encoder.output: got 'pooled', but other engines read patch features")
    if encoder.grid is not None:
        raise _cannot(f"model.vision_encoder.grid: got {encoder.grid}, an average that other engines do not have")
    if len(encoder.layers) != 1:
        raise _cannot(f"model.vision_encoder.layer: got {encoder.layers}, but other engines read one layer")
    if isinstance(encoder, TransformersEncoder) and type(encoder.model).__name__ in _TOWERS:
        return _from_transformers(encoder)
    if isinstance(encoder, TimmEncoder) and type(encoder.model).__name__ == "VisionTransformer":
        return _from_timm(encoder)
    raise _cannot(f"model.vision_encoder: '{encoder.name}' has no form in other engines")


def _cannot(problem: str) -> ExportError:
    return ExportError(f"{problem}; {_CAN}")


_TOWERS = ("SiglipVisionModel", "SiglipVisionTransformer", "CLIPVisionModel", "CLIPVisionTransformer")


def _from_transformers(encoder: TransformersEncoder) -> PlainViT:
    config = encoder.model.config
    layer = encoder.layers[0]
    is_clip = "CLIP" in type(encoder.model).__name__
    if config.image_size != encoder.image_size:
        raise _cannot(
            f"model.vision_encoder.image_size: got {encoder.image_size}, for which the positions of '{encoder.name}' "
            f"are interpolated; expected its own {config.image_size}"
        )
    if config.hidden_act not in _ACTIVATIONS:
        raise _cannot(f"model.vision_encoder: '{encoder.name}' has activation {config.hidden_act}")
    state = {name.removeprefix("vision_model."): value for name, value in encoder.model.state_dict().items()}
    blocks = config.num_hidden_layers if layer == FINAL else layer
    tensors = {
        "patch.weight": state["embeddings.patch_embedding.weight"],
        "position": state["embeddings.position_embedding.weight"],
    }
    names = {
        **{"patch.bias": "embeddings.patch_embedding.bias", "class": "embeddings.class_embedding"},
        **{f"pre_norm.{part}": f"pre_layrnorm.{part}" for part in ("weight", "bias")},
    }
    tensors |= {own: state[theirs] for own, theirs in names.items() if theirs in state}
    normed = layer == FINAL and not is_clip  # CLIP normalizes its class token only
    if normed:
        tensors |= {f"post_norm.{part}": state[f"post_layernorm.{part}"] for part in ("weight", "bias")}
    inside = {
        **{"norm1": "layer_norm1", "norm2": "layer_norm2", "up": "mlp.fc1", "down": "mlp.fc2"},
        **{one: f"self_attn.{one}_proj" for one in ("q", "k", "v", "out")},
    }
    for number in range(blocks):
        for own, theirs in inside.items():
            for part in ("weight", "bias"):
                tensors[f"blocks.{number}.{own}.{part}"] = state[f"encoder.layers.{number}.{theirs}.{part}"]
    return PlainViT(
        width=config.hidden_size,
        heads=config.num_attention_heads,
        inner=config.intermediate_size,
        blocks=blocks,
        eps=config.layer_norm_eps,
        gelu=_ACTIVATIONS[config.hidden_act],
        image_size=encoder.image_size,
        patch_size=config.patch_size,
        normed=normed,
        tensors=_float32(tensors),
    )


def _from_timm(encoder: TimmEncoder) -> PlainViT:
    model: Any = encoder.model
    layer = encoder.layers[0]
    _check_timm(model, encoder.name)
    blocks = len(model.blocks) if layer == FINAL else layer + 1
    tensors = {"patch.weight": model.patch_embed.proj.weight, "position": model.pos_embed[0]}
    if model.patch_embed.proj.bias is not None:
        tensors["patch.bias"] = model.patch_embed.proj.bias
    norms = {"pre_norm": model.norm_pre, **({"post_norm": model.norm} if layer == FINAL else {})}
    for name, norm in norms.items():
        if isinstance(norm, nn.LayerNorm):
            tensors |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
    for number, block in enumerate(model.blocks[:blocks]):
        parts = {"norm1": block.norm1, "norm2": block.norm2, "up": block.mlp.fc1}
        values = {name: (part.weight, part.bias) for name, part in parts.items()}
        qkv = block.attn.qkv
        weights, biases = (
            qkv.weight.chunk(3),
            torch.zeros_like(qkv.weight[:, 0]).chunk(3) if qkv.bias is None else qkv.bias.chunk(3),
        )
        values |= {name: (weights[i], biases[i]) for i, name in enumerate("qkv")}
        values["out"] = _scaled(block.attn.proj, block.ls1)
        values["down"] = _scaled(block.mlp.fc2, block.ls2)
        for name, (weight, bias) in values.items():
            tensors[f"blocks.{number}.{name}.weight"], tensors[f"blocks.{number}.{name}.bias"] = weight, bias
    first = model.blocks[0]
    return PlainViT(
        width=model.embed_dim,
        heads=first.attn.num_heads,
        inner=first.mlp.fc1.out_features,
        blocks=blocks,
        eps=first.norm1.eps,
        gelu=_timm_gelu(first.mlp.act) or "erf",
        image_size=encoder.image_size,
        patch_size=model.patch_embed.patch_size[0],
        normed="post_norm.weight" in tensors,
        tensors=_float32(tensors),
    )


def _check_timm(model: Any, name: str) -> None:
    """Refuse a ViT with parts beyond SigLIP's."""
    if model.num_prefix_tokens:
        raise _cannot(
            f"model.vision_encoder: '{name}' has a class token, which llama.cpp puts behind the patches instead of in "
            "front of them"
        )
    first = model.blocks[0]
    extra = [
        part
        for part in ("q_norm", "k_norm", "norm")
        if not isinstance(getattr(first.attn, part, nn.Identity()), nn.Identity)
    ]
    extra += [] if isinstance(getattr(first.mlp, "norm", nn.Identity()), nn.Identity) else ["mlp.norm"]
    if (
        extra
        or not isinstance(first.norm1, nn.LayerNorm)
        or model.pos_embed is None
        or _timm_gelu(first.mlp.act) is None
    ):
        raise _cannot(f"model.vision_encoder: the blocks of '{name}' are not those of SigLIP")
    if tuple(model.pos_embed.shape[1:2]) != (model.patch_embed.num_patches,):
        raise _cannot(f"model.vision_encoder: '{name}' interpolates its positions")


def _timm_gelu(activation: nn.Module) -> Gelu | None:
    if isinstance(activation, nn.GELU):
        return "tanh" if activation.approximate == "tanh" else "erf"
    return {"GELUTanh": "tanh", "QuickGELU": "quick", "GELU": "erf"}.get(type(activation).__name__)  # type: ignore[return-value]


def _scaled(layer: nn.Linear, scale: nn.Module) -> tuple[Tensor, Tensor]:
    """A linear layer with the layer scale that follows it."""
    if isinstance(scale, nn.Identity):
        return layer.weight, layer.bias
    gamma: Any = scale.gamma
    return layer.weight * gamma[:, None], layer.bias * gamma


def _float32(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
