"""Several encoders as one, their tokens concatenated along the features (Karamcheti et al. 2024, "Prismatic VLMs")."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from frozenprefix.errors import ConfigError
from frozenprefix.models.encoder_configuration import FusedEncoderConfig
from frozenprefix.models.vision.base import FINAL, BuiltEncoder, VisionEncoder


class PixelScale(NamedTuple):
    """Scaling of pixels from 0 to 255 by an image processor: `pixel * gain + shift` for each of the three channels.

    Example:
        >>> raw, unit = PixelScale([1.0] * 3, [0.0] * 3), PixelScale([1 / 255] * 3, [-0.5] * 3)
        >>> raw.change_to(unit).shift
        [-0.5, -0.5, -0.5]
    """

    gain: list[float]
    shift: list[float]

    @classmethod
    def from_processor(cls, image_processor: Any) -> PixelScale:
        """Read the scale off an image processor of transformers."""
        factor = float(image_processor.rescale_factor) if image_processor.do_rescale else 1.0
        if not image_processor.do_normalize:
            return cls([factor] * 3, [0.0] * 3)
        means, deviations = image_processor.image_mean, image_processor.image_std
        return cls([factor / d for d in deviations], [-m / d for m, d in zip(means, deviations, strict=True)])

    def change_to(self, other: PixelScale) -> PixelScale:
        """The scale that turns pixels of this scale into pixels of the other."""
        gain = [to / own for own, to in zip(self.gain, other.gain, strict=True)]
        return PixelScale(gain, [to - own * g for own, to, g in zip(self.shift, other.shift, gain, strict=True)])


class FusedEncoder(VisionEncoder):
    """Encoders that read the same images; their maps and pooled features are concatenated.

    Args:
        encoders: the parts, for images of one size.
        scales: pixel scaling of each part's image processor. Images arrive in the scale of the first part; for
            the others that scale is undone and theirs applied. Resizing and cropping are therefore the first part's for
            all, so that tokens of the same place in the image are concatenated.
        pooled, grid: as in `VisionEncoder`, for all parts.
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
        # From the first part's pixels to each part's. These are not buffers: a cast of the weights must not round them.
        self.changes = [scales[0].change_to(scale) for scale in scales]
        self.measure()

    def parts(self) -> list[VisionEncoder]:
        return [encoder for encoder in self.encoders if isinstance(encoder, VisionEncoder)]

    def maps(self, pixel_values: Tensor) -> list[Tensor]:
        # [B, 3, H, W] -> [B, D_i, H_i, W_i] per part and layer
        maps = []
        for part, pixels in zip(self.parts(), self.rescale(pixel_values), strict=True):
            maps += part.maps(pixels)
        return maps

    def pool(self, pixel_values: Tensor) -> Tensor:
        # [B, 3, H, W] -> [B, sum of D_enc]
        pixels = self.rescale(pixel_values)
        return torch.cat([part.pool(own) for part, own in zip(self.parts(), pixels, strict=True)], dim=1)

    def rescale(self, pixel_values: Tensor) -> list[Tensor]:
        """float[B, 3, H, W] per part, as its own image processor would have scaled the pixels."""
        images = []
        for part, change in zip(self.parts(), self.changes, strict=True):
            gain, shift = (torch.tensor(values, device=pixel_values.device)[:, None, None] for values in change)
            own = (pixel_values * gain + shift).to(pixel_values.dtype)
            images.append(own.to(memory_format=part.memory_format))
        return images


def join_encoders(config: FusedEncoderConfig, parts: list[BuiltEncoder]) -> BuiltEncoder:
    """Join built encoders to a `FusedEncoder`, with the image processor of the first one.

    Raises:
        ConfigError: if the parts take images of different sizes, or give different numbers of tokens.
    """
    sizes = [part.module.image_size for part in parts]
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"the encoders take images of different sizes ({', '.join(map(str, sizes))} pixels); set image_size "
            "beside encoders"
        )
    encoder = FusedEncoder(
        [part.module for part in parts],
        [PixelScale.from_processor(part.image_processor) for part in parts],
        pooled=config.output == "pooled",
        grid=config.grid,
    )
    identity = {"source": "fused"}
    for number, part in enumerate(parts):
        identity |= {f"{number}.{key}": value for key, value in part.identity.items()}
    return BuiltEncoder(encoder, parts[0].image_processor, identity)
