"""What every vision encoder shares: the contract, and the way from feature maps to tokens.

Shape letters: B images, H and W of the image or of the feature map, N tokens, D_enc features of a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frozenprefix.errors import ConfigError

FINAL = -1
"""The layer that stands for the library's own final tokens, norm or head convolution included."""


@dataclass(frozen=True)
class BuiltEncoder:
    """A vision encoder, the image processor that feeds it, and the exact identity of its weights."""

    module: VisionEncoder
    image_processor: Any
    identity: dict[str, str]


class VisionEncoder(nn.Module, ABC):
    """Images → image features.

    Subclasses give `maps`, `pool` and `blocks`, and call `measure()` when they are complete.

    Args:
        name: the architecture, as error messages should say it.
        layers: absolute layer numbers, or `FINAL`; several are concatenated along the feature axis.
        image_size: pixels of the square image that `num_tokens` is given for.
        pooled: one vector per image instead of its patch grid.
        grid: average the patch grid down to `grid × grid`.
        channels_last: memory format of convolutional networks; on CPUs 1.7 times as fast for EfficientNet-Lite0.
    """

    def __init__(
        self,
        *,
        name: str,
        layers: list[int],
        image_size: int,
        pooled: bool = False,
        grid: int | None = None,
        channels_last: bool = False,
    ):
        super().__init__()
        self.name = name
        self.layers = layers
        self.image_size = image_size
        self.pooled = pooled
        self.grid = grid
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.encoder_dim = 0
        self.num_tokens = 0
        self.autocast_dtype: torch.dtype | None = None  # set for encoders that are trained from float32 weights

    @abstractmethod
    def maps(self, pixel_values: Tensor) -> list[Tensor]:
        """Return one feature map float[B, D_i, H_i, W_i] per entry of `self.layers`."""

    @abstractmethod
    def pool(self, pixel_values: Tensor) -> Tensor:
        """Return the library's own pooled features, float[B, D_enc]."""

    def blocks(self) -> list[nn.Module]:
        """The network's blocks or stages, in the order in which they are computed: `trainable: 2` means the last two.

        Raises:
            ConfigError: for a network whose blocks are not known.
        """
        raise ConfigError(f"model.vision_encoder.trainable: the blocks of '{self.name}' are not known; use 'all'")

    def late_parameters(self) -> list[nn.Parameter]:
        """Parameters that work behind the last block, but are registered before it."""
        return []

    def parts(self) -> list[VisionEncoder]:
        """The networks that it is made of: itself, unless it is several."""
        return [self]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixel_values: float[B, 3, H, W] from the encoder's image processor, in any float dtype.

        Returns:
            image_features: float[B, N, D_enc] in the encoder's dtype; row-major patches, or N = 1 when pooled. With
            `autocast_dtype`, in that or in float32, whatever the last operation gives.
        """
        parameter = next(self.parameters())
        # [B, 3, H, W]
        pixel_values = pixel_values.to(dtype=parameter.dtype, memory_format=self.memory_format)
        half = self.autocast_dtype
        with torch.autocast(pixel_values.device.type, dtype=half, enabled=half is not None):
            return self.features(pixel_values)

    def features(self, pixel_values: Tensor) -> Tensor:
        """As `forward`, for pixels in the encoder's dtype and memory format."""
        if self.pooled:
            return self.pool(pixel_values).unsqueeze(1)  # [B, 1, D_enc]
        maps = self.maps(pixel_values)
        if self.grid is not None:
            maps = [F.adaptive_avg_pool2d(one, self.grid) for one in maps]
        # [B, D_enc, H', W'] -> [B, H'·W', D_enc]
        return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)

    def measure(self) -> None:
        """Set `encoder_dim` and `num_tokens` by encoding one black image.

        Raises:
            ConfigError: if the network does not take images of `image_size`, or its maps do not fit together.
        """
        with image_probe(self, self.name, self.image_size) as image:
            maps = [self.pool(image)[..., None, None]] if self.pooled else self.maps(image)
        sizes = [tuple(one.shape[-2:]) for one in maps]
        self._check_sizes(sizes)
        self.encoder_dim = sum(one.shape[1] for one in maps)
        self.num_tokens = self.grid**2 if self.grid is not None else sizes[0][0] * sizes[0][1]

    def _check_sizes(self, sizes: list[tuple[int, ...]]) -> None:
        smallest = min(min(size) for size in sizes)
        if self.grid is not None and self.grid > smallest:
            raise ConfigError(
                f"grid must be at most {smallest}, the side of the patch grid of '{self.name}' at "
                f"image_size {self.image_size}, got {self.grid}"
            )
        if self.grid is None and len(set(sizes)) > 1:
            listed = ", ".join("×".join(map(str, size)) for size in sizes)
            raise ConfigError(
                f"the layers {self.layers} of '{self.name}' have grids of different sizes ({listed}); "
                f"set grid (at most {smallest}) to bring them to one size"
            )


@contextmanager
def image_probe(module: nn.Module, name: str, image_size: int) -> Iterator[Tensor]:
    """Give a black image, float[1, 3, image_size, image_size], to look at the outputs of `module`.

    Raises:
        ConfigError: if the network fails on it.
    """
    module.eval()  # or the image would move the running statistics of batch norms
    weight = next(module.parameters())
    try:
        with torch.no_grad():
            yield torch.zeros(1, 3, image_size, image_size, dtype=weight.dtype, device=weight.device)
    except ConfigError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"'{name}' does not take images of image_size {image_size}: {error}") from error


def layer_list(layer: int | list[int]) -> list[int]:
    return [layer] if isinstance(layer, int) else list(layer)


def resolve_layers(layers: list[int], count: int, name: str) -> list[int]:
    """Turn negative layer numbers into absolute ones, but for `FINAL`, which stays.

    Raises:
        ConfigError: for a layer that the network does not have.
    """
    wrong = [layer for layer in layers if not -count <= layer < count]
    if wrong:
        raise ConfigError(f"layer must be from {-count} to {count - 1} for '{name}', got {', '.join(map(str, wrong))}")
    return [layer if layer >= 0 or layer == FINAL else count + layer for layer in layers]


def tokens_to_map(tokens: Tensor, name: str) -> Tensor:
    """float[B, N, D] of a square image's patches, row-major → float[B, D, √N, √N].

    Raises:
        ConfigError: if the tokens form no square.
    """
    side = isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise ConfigError(
            f"the {tokens.shape[1]} tokens of '{name}' form no square grid; use output 'pooled', or another encoder"
        )
    return tokens.transpose(1, 2).unflatten(2, (side, side))
