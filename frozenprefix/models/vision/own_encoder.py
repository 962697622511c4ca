"""Encoders of the user's own: any `nn.Module` class from pixels to features, registered under a name."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn

from frozenprefix.errors import ConfigError
from frozenprefix.models.encoder_configuration import CustomEncoderConfig
from frozenprefix.models.freezing import hash_tensors
from frozenprefix.models.vision.base import FINAL, BuiltEncoder, VisionEncoder, tokens_to_map
from frozenprefix.models.vision.image_processing import make_image_processor

_HALF = (0.5, 0.5, 0.5)


def build_own(config: CustomEncoderConfig, network_class: type[nn.Module]) -> BuiltEncoder:
    """Build an encoder from a class; see `register_vision_encoder`.

    Raises:
        ConfigError: for features of another shape.
    """
    network = network_class(**config.options)
    size = config.image_size or int(getattr(network, "image_size", 224))
    encoder = OwnEncoder(
        network, name=config.source, image_size=size, pooled=config.output == "pooled", grid=config.grid
    )
    processor = getattr(network, "image_processor", None) or make_image_processor(
        image_size=size,
        resize_mode="shortest",
        interpolation="bicubic",
        mean=getattr(network, "image_mean", _HALF),
        std=getattr(network, "image_std", _HALF),
    )
    identity = {"source": config.source, "name": network_class.__qualname__}
    return BuiltEncoder(encoder, processor, {**identity, "sha256": hash_tensors(network.state_dict())})


class OwnEncoder(VisionEncoder):
    """A network of the user's own in the place of an encoder; pooled features are the mean over its tokens."""

    def __init__(self, network: nn.Module, *, name: str, image_size: int, pooled: bool, grid: int | None):
        super().__init__(name=name, layers=[FINAL], image_size=image_size, pooled=pooled, grid=grid)
        # dtype and device also for a network without parameters of its own, such as another runtime's
        self.place = nn.Parameter(torch.zeros(0), requires_grad=False)
        self.network = network
        self.measure()

    def maps(self, pixel_values: Tensor) -> list[Tensor]:
        features = self.network(pixel_values)
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        if not isinstance(features, Tensor) or features.ndim not in (2, 3, 4) or len(features) != len(pixel_values):
            raise ConfigError(
                f"vision encoder '{self.name}': forward gave {shape} for {len(pixel_values)} images, expected "
                "[B, D], [B, N, D] or [B, D, H, W]"
            )
        if features.ndim == 4:
            return [features]
        # [B, D] -> [B, 1, D]
        tokens = features[:, None] if features.ndim == 2 else features
        if isqrt(tokens.shape[1]) ** 2 == tokens.shape[1]:
            return [tokens_to_map(tokens, self.name)]
        # tokens that form no square: [B, N, D] -> [B, D, N, 1]
        return [tokens.transpose(1, 2).unsqueeze(3)]

    def pool(self, pixel_values: Tensor) -> Tensor:
        return self.maps(pixel_values)[0].mean(dim=(2, 3))

    def blocks(self) -> list[nn.Module]:
        blocks = getattr(self.network, "blocks", None)
        if isinstance(blocks, nn.ModuleList | nn.Sequential):
            return list(blocks)
        return list(blocks()) if callable(blocks) else super().blocks()
