"""Image processor for encoders of timm and open_clip: their evaluation transform, as transformers can save it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL.Image import Resampling
from transformers import AutoImageProcessor
from transformers.image_processing_backends import PilBackend

from frozenprefix.errors import ConfigError
from frozenprefix.models.configuration import FrozenPrefixConfig
from frozenprefix.utils.images import to_images

_RESAMPLING = {"bicubic": Resampling.BICUBIC, "bilinear": Resampling.BILINEAR}


class FrozenPrefixImageProcessor(PilBackend):
    """Resize, crop, rescale and normalize with PIL, equal to torchvision's transforms on PIL images in every pixel.

    transformers' own processors differ from those transforms in one point: their centre crop rounds half a pixel down,
    torchvision's rounds it to even, which shifts about a quarter of all images by one pixel.

    Example:
        >>> processor = FrozenPrefixImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        >>> processor(image, return_tensors="pt")["pixel_values"].shape
        torch.Size([1, 3, 32, 32])
    """

    resample = Resampling.BICUBIC
    size = {"shortest_edge": 224}  # noqa: RUF012 - transformers reads its defaults from such class attributes
    crop_size = {"height": 224, "width": 224}  # noqa: RUF012
    default_to_square = False
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    do_convert_rgb = True
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        """Pixels of files, PIL images, arrays or tensors, all of which are converted to upright 8-bit RGB first."""
        return super().preprocess(to_images(images), *args, **kwargs)

    def center_crop(self, image: np.ndarray, size: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """Crop float or uint8[3, H, W] to `size`; the image must not be smaller."""
        # Python's round rounds half to even, as torchvision does.
        top = round((image.shape[-2] - size.height) / 2)
        left = round((image.shape[-1] - size.width) / 2)
        return image[:, top : top + size.height, left : left + size.width]


# One class for both backends: a saved processor gives the same pixels wherever it is loaded.
AutoImageProcessor.register(
    FrozenPrefixConfig,
    image_processor_classes={"pil": FrozenPrefixImageProcessor, "torchvision": FrozenPrefixImageProcessor},
    exist_ok=True,
)


def make_image_processor(
    *, image_size: int, resize_mode: str, interpolation: str, mean: Any, std: Any, crop_pct: float = 1.0
) -> FrozenPrefixImageProcessor:
    """Build the processor from what timm calls the data config and open_clip the preprocessing config.

    Args:
        image_size: side of the square result, in pixels.
        resize_mode: "shortest" keeps the aspect ratio and crops the centre, "squash" does not keep it.
        interpolation: "bicubic" or "bilinear".
        mean, std: of the three channels, for pixels from 0 to 1.
        crop_pct: side of the crop divided by the side of the resized image.

    Raises:
        ConfigError: for a mode without equivalent in transformers.

    Example:
        >>> processor = make_image_processor(
        ...     image_size=32, resize_mode="squash", interpolation="bicubic", mean=[0.5] * 3, std=[0.5] * 3
        ... )
        >>> processor(image, return_tensors="pt")["pixel_values"].shape
        torch.Size([1, 3, 32, 32])
    """
    if resize_mode not in ("shortest", "squash"):
        raise ConfigError(f"resizing must be 'shortest' or 'squash', but the encoder's own is '{resize_mode}'")
    if interpolation not in _RESAMPLING:
        known = ", ".join(_RESAMPLING)
        raise ConfigError(f"interpolation must be one of {known}, but the encoder's own is '{interpolation}'")
    edge = math.floor(image_size / crop_pct)
    return FrozenPrefixImageProcessor(
        size={"shortest_edge": edge} if resize_mode == "shortest" else {"height": edge, "width": edge},
        crop_size={"height": image_size, "width": image_size},
        resample=_RESAMPLING[interpolation],
        image_mean=list(mean),
        image_std=list(std),
    )


def show_whole_image(processor: Any, image_size: int) -> None:
    """Change an image processor to resize images to a square, without cropping."""
    processor.size = type(processor.size)(height=image_size, width=image_size)
    processor.default_to_square = True
    processor.do_center_crop = False
