"""Several encoders as one: their tokens side by side along the features (Karamcheti et al. 2024, "Prismatic VLMs")."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from frozenprefix.errors import ConfigError
from frozenprefix.models.configuration import FusedEncoderConfig
from frozenprefix.models.vision.base import FINAL, BuiltEncoder, VisionEncoder


class PixelScale(NamedTuple):
    """What an image processor makes of a pixel from 0 to 255: `pixel * gain + shift`, three of each."""

    gain: list[float]
    shift: list[float]

    @classmethod
    def of(cls, image_processor: Any) -> PixelScale:
        factor = float(image_processor.rescale_factor) if image_processor.do_rescale else 1.0
        if not image_processor.do_normalize:
            return cls([factor] * 3, [0.0] * 3)
        means, deviations = image_processor.image_mean, image_processor.image_std
        return cls([factor / d for d in deviations], [-m / d for m, d in zip(means, deviations, strict=True)])


class FusedEncoder(VisionEncoder):
    """Encoders that see the same images; `maps` and `pool` are theirs, one after the other.

    Args:
        encoders: the parts, for images of one size.
        scales: what the image processor of each part does to pixels. Images arrive as those of the first part:
            for the others its scale is undone and theirs applied. Resizing and crop are therefore the first part's for
            all, so that tokens of the same place lie side by side.
    """

    def __init__(
        self, encoders: list[VisionEncoder], scales: list[PixelScale], *, pooled: bool = False, grid: int | None = None
    ):
        super().__init__(
            name=" + ".join(encoder.name for encoder in encoders),
            layers=[FINAL] * sum(len(encoder.layers) for encoder in encoders),
            image_size=encoders[0].image_size,
            pooled=pooled,
            grid=grid,
        )
        self.encoders = nn.ModuleList(encoders)
        # From the first part's pixels to each part's. No buffers: a cast of the weights must not round them.
        self.changes = [_change(scales[0], scale) for scale in scales]
        self.measure()

    def parts(self) -> list[VisionEncoder]:
        return [encoder for encoder in self.encoders if isinstance(encoder, VisionEncoder)]

    def maps(self, pixel_values: Tensor) -> list[Tensor]:
        images = self._images(pixel_values)
        return [one for part, own in zip(self.parts(), images, strict=True) for one in part.maps(own)]

    def pool(self, pixel_values: Tensor) -> Tensor:
        images = self._images(pixel_values)
        return torch.cat([part.pool(own) for part, own in zip(self.parts(), images, strict=True)], dim=1)

    def _images(self, pixel_values: Tensor) -> list[Tensor]:
        """float[B, 3, H, W] as each part's own image processor would have scaled it."""
        images = []
        for part, change in zip(self.parts(), self.changes, strict=True):
            gain, shift = (torch.tensor(one, device=pixel_values.device)[:, None, None] for one in change)
            own = (pixel_values * gain + shift).to(pixel_values.dtype)
            images.append(own.to(memory_format=part.memory_format))
        return images


def _change(given: PixelScale, wanted: PixelScale) -> PixelScale:
    """From pixels of one scale to those of another."""
    gain = [w / g for g, w in zip(given.gain, wanted.gain, strict=True)]
    return PixelScale(gain, [w - g * by for g, w, by in zip(given.shift, wanted.shift, gain, strict=True)])


def build(config: FusedEncoderConfig) -> BuiltEncoder:
    """Build a `FusedEncoder`; what stands beside `encoders` (output, grid, image_size, resize) is for all of them.

    Raises:
        ConfigError: for parts that take images of different sizes, or give different numbers of tokens.
        AssetError: as the parts' own sources.
    """
    from frozenprefix.models.vision import build_vision_encoder

    # the parts' weights are rounded with the whole, after the pixels' scales were worked out
    parts = [build_vision_encoder(part) for part in config.configs()]
    sizes = [part.module.image_size for part in parts]
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"the encoders take images of different sizes ({', '.join(map(str, sizes))} pixels); set image_size "
            "beside encoders"
        )
    encoder = FusedEncoder(
        [part.module for part in parts],
        [PixelScale.of(part.image_processor) for part in parts],
        pooled=config.output == "pooled",
        grid=config.grid,
    )
    identity = {f"{number}.{key}": value for number, part in enumerate(parts) for key, value in part.identity.items()}
    return BuiltEncoder(encoder, parts[0].image_processor, {"source": "fused", **identity})
