"""Interface of all vision encoders, and the conversion of feature maps to tokens.

Shape letters: B images, H and W of the image or of the feature map, N tokens, D_enc width of the features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frozenprefix.errors import ConfigError
from frozenprefix.kernels.precision import autocast_to

FINAL = -1
"""Layer number of the library's final tokens, after the final norm or head convolution."""


@dataclass(frozen=True)
class BuiltEncoder:
    """A vision encoder, its image processor, and the exact identity of its weights.

    Example:
        >>> encoder = BuiltEncoder(model.vision_encoder, processor.image_processor, {"weights": "random"})
        >>> encoder.module.image_size
        32
    """

    module: VisionEncoder
    image_processor: Any
    identity: dict[str, str]


class VisionEncoder(nn.Module, ABC):
    """Images -> image features.

    Subclasses implement `maps`, `pool` and `blocks`, and call `measure()` at the end of their constructor.

    Args:
        name: the architecture, for error messages.
        layers: absolute layer numbers, or `FINAL`; several are concatenated along the feature axis.
        image_size: side of the square image, in pixels, that `num_tokens` refers to.
        pooled: give one vector per image instead of its patch grid.
        grid: average the patch grid down to `grid` x `grid`.
        channels_last: memory format of convolutional networks; 1.7 times as fast for EfficientNet-Lite0 on a CPU.

    Attributes:
        encoder_dim: width of the features, D_enc.
        num_tokens: tokens per image, N.
        autocast_dtype: dtype to compute in, for an encoder that is trained with float32 weights; else None.

    Example:
        >>> model.vision_encoder.num_tokens > 0
        True
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
        self.autocast_dtype: torch.dtype | None = None

    @abstractmethod
    def maps(self, pixel_values: Tensor) -> list[Tensor]:
        """Return one feature map float[B, D_i, H_i, W_i] for each entry of `self.layers`."""

    @abstractmethod
    def pool(self, pixel_values: Tensor) -> Tensor:
        """Return the library's own pooled features, float[B, D_enc]."""

    def blocks(self) -> list[nn.Module]:
        """Return the network's blocks or stages in the order of computation: `trainable: 2` means the last two.

        Raises:
            ConfigError: for a network whose blocks are not known.
        """
        raise ConfigError(f"model.vision_encoder.trainable: the blocks of '{self.name}' are not known; use 'all'")

    def late_parameters(self) -> list[nn.Parameter]:
        """Parameters that are used after the last block but registered before it."""
        return []

    def parts(self) -> list[VisionEncoder]:
        """The single encoders: this one, unless it joins several."""
        return [self]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixel_values: float[B, 3, H, W] from the encoder's image processor, in any float dtype.

        Returns:
            image_features: float[B, N, D_enc] in the encoder's dtype; patches in raster order, or N = 1 if pooled. With
            `autocast_dtype`, in that dtype or in float32, depending on the last operation.
        """
        parameter = next(self.parameters())
        # [B, 3, H, W]
        pixel_values = pixel_values.to(dtype=parameter.dtype, memory_format=self.memory_format)
        with autocast_to(self.autocast_dtype, pixel_values.device):
            if self.pooled:
                # -> [B, D_enc] -> [B, 1, D_enc]
                return self.pool(pixel_values).unsqueeze(1)
            # -> [B, D_i, H_i, W_i] per layer
            maps = self.maps(pixel_values)
            if self.grid is not None:
                maps = [F.adaptive_avg_pool2d(one, self.grid) for one in maps]
            # -> [B, D_enc, H', W'] -> [B, H' * W', D_enc]
            return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)

    def measure(self) -> None:
        """Set `encoder_dim` and `num_tokens` by encoding one black image.

        Raises:
            ConfigError: if the network rejects images of `image_size`, or its maps have different sizes.
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


def reading_options(config: Any) -> dict[str, Any]:
    """Constructor arguments of a `VisionEncoder` for its output: name, layers, pooled and grid."""
    layer = config.layer
    return {
        "name": config.name,
        "layers": [layer] if isinstance(layer, int) else list(layer),
        "pooled": config.output == "pooled",
        "grid": config.grid,
    }


@contextmanager
def image_probe(module: nn.Module, name: str, image_size: int) -> Iterator[Tensor]:
    """Yield a black image, float[1, 3, image_size, image_size], to inspect the outputs of `module` in the block.

    Raises:
        ConfigError: if the network fails on it.
    """
    module.eval()  # otherwise the image would change the running statistics of batch norms
    weight = next(module.parameters())
    try:
        with torch.no_grad():
            yield torch.zeros(1, 3, image_size, image_size, dtype=weight.dtype, device=weight.device)
    except ConfigError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"'{name}' does not take images of image_size {image_size}: {error}") from error


def square_side(size: int | Sequence[int], name: str) -> int:
    """Return the side of a square image, whose size is given as one number or as height and width.

    Raises:
        ConfigError: if the sides differ.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ConfigError(f"'{name}' takes images of {height}×{width} pixels; set image_size to encode square ones")
    return height


def resolve_layers(layers: list[int], count: int, name: str) -> list[int]:
    """Convert negative layer numbers to absolute ones; `FINAL` stays.

    Raises:
        ConfigError: for a layer that the network does not have.

    Example:
        >>> resolve_layers([-2, FINAL, 0], count=12, name="vit")
        [10, -1, 0]
    """
    wrong = [layer for layer in layers if not -count <= layer < count]
    if wrong:
        raise ConfigError(f"layer must be from {-count} to {count - 1} for '{name}', got {', '.join(map(str, wrong))}")
    return [layer if layer >= 0 or layer == FINAL else count + layer for layer in layers]


def tokens_to_map(tokens: Tensor, name: str) -> Tensor:
    """Arrange the patch tokens of a square image: float[B, N, D] in raster order -> float[B, D, √N, √N].

    Raises:
        ConfigError: if N is not a square.

    Example:
        >>> tokens_to_map(torch.zeros(1, 9, 4), "vit").shape
        torch.Size([1, 4, 3, 3])
    """
    side = isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise ConfigError(
            f"the {tokens.shape[1]} tokens of '{name}' form no square grid; use output 'pooled', or another encoder"
        )
    return tokens.transpose(1, 2).unflatten(2, (side, side))
