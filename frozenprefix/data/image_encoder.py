"""From images to image features: decode once, image processor, frozen vision encoder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from frozenprefix.data.augmentation import View
from frozenprefix.data.images import BadImages, processing, to_image
from frozenprefix.errors import BadImageError, DataError
from frozenprefix.models.encoder_configuration import VisionEncoderConfig
from frozenprefix.models.vision import VisionEncoder, build_vision_encoder
from frozenprefix.models.vision.precomputed import feature_table

ImageInput = str | PathLike[str] | Image
Fingerprint = dict[str, str | int]


@dataclass(frozen=True)
class ImageEncoder:
    """A vision encoder with the image processor that feeds it: the one way from images to image features.

    With precomputed features (`source: features`) image files are looked up in the feature table, and not read.

    Args:
        module: the vision encoder.
        image_processor: a transformers image processor.
        config, identity: the encoder's config section and the identity of its weights, for the fingerprint.
        view: what is encoded of each image; None: the whole.

    Example:
        >>> encoder = ImageEncoder.from_model(model, processor)
        >>> encoder([image, image_path]).shape  # [images, N, D_enc]
        torch.Size([2, 4, 64])
    """

    module: VisionEncoder
    image_processor: Any
    config: VisionEncoderConfig | None = None
    identity: dict[str, str] = field(default_factory=dict)
    view: View | None = None

    @classmethod
    def from_config(cls, config: VisionEncoderConfig) -> ImageEncoder:
        """Build the encoder alone, without a language model."""
        built = build_vision_encoder(config)
        return cls(built.module, built.image_processor, config, built.identity)

    @classmethod
    def from_model(cls, model: Any, processor: Any) -> ImageEncoder:
        """The encoder of a model, and the image processor of its processor."""
        identity = getattr(model.config, "identity", {}).get("vision_encoder", {})
        config = getattr(model.config, "vision_encoder", None)
        return cls(model.vision_encoder, processor.image_processor, config, identity)

    @property
    def fingerprint(self) -> Fingerprint:
        """Everything that image features depend on, apart from the image."""
        assert self.config is not None, "the encoder was built from a config"
        return {
            **{f"encoder.{name}": json.dumps(value) for name, value in self.config.feature_fields().items()},
            **{f"weights.{name}": value for name, value in self.identity.items()},
            "preprocessing": self.image_processor.to_json_string(),
            **({} if self.view is None else {"view": self.view.name}),
        }

    @property
    def device(self) -> torch.device:
        """Device of the encoder's weights; the CPU for precomputed features."""
        weight = next(self.module.parameters(), None)
        return torch.device("cpu") if weight is None else weight.device

    @property
    def batch_size(self) -> int:
        """Images to encode at once.

        Few on CPUs, where a layer's output then stays in the caches until the next layer reads it: EfficientNet-Lite0
        in bfloat16 encoded 230 images/s in batches of 8, and 150 in batches of 32.
        """
        return 8 if self.device.type == "cpu" else 64

    def pixel_values(self, images: Sequence[Image]) -> Tensor:
        """RGB images -> float[n, 3, H, W]."""
        shown = list(images) if self.view is None else [self.view(image) for image in images]
        return self.image_processor(shown, return_tensors="pt")["pixel_values"]

    @torch.inference_mode()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """float[n, 3, H, W] -> image_features: float32[n, N, D_enc], on the encoder's device."""
        return self.module(pixel_values.to(self.device)).float()

    def __call__(self, images: Sequence[ImageInput] | Tensor) -> Tensor:
        """Encode one batch.

        Args:
            images: image files, PIL images, or image features float[n, N, D_enc], which are returned as they are.

        Returns:
            image_features: float32[n, N, D_enc].

        Raises:
            BadImageError: for a file that cannot be read.
            DataError: for images that the feature table lacks.
        """
        if isinstance(images, Tensor):
            return images
        table = feature_table(self.module)
        if table is not None:
            return table.features(_files(images))
        return self.encode(self.pixel_values([to_image(image) for image in images]))

    def batches(
        self, images: Iterable[ImageInput], size: int, bad: BadImages | None = None
    ) -> Iterator[tuple[list[ImageInput], Tensor]]:
        """Encode any number of images, each decoded once and in batches of `size`.

        Args:
            bad: collects the files that cannot be read, which are left out; without it the first one raises.

        Yields:
            The images of a batch as they came, and their image_features float32[n, N, D_enc].
        """
        table = feature_table(self.module)
        batch: list[tuple[ImageInput, Tensor]] = []  # images and their pixel values
        for image in images:
            try:
                batch.append((image, torch.empty(0) if table is not None else self.prepare(image)))
            except BadImageError as error:
                if bad is None:
                    raise
                bad.record(str(image), error)
            if len(batch) == size:
                yield self._encode_batch(batch)
                batch = []
        if batch:
            yield self._encode_batch(batch)

    def prepare(self, image: ImageInput) -> Tensor:
        """Pixel values float[1, 3, H, W] of one image.

        Raises:
            BadImageError: for a file that cannot be read, and an image that the image processor fails on.
        """
        opened = to_image(image)
        with processing(image):
            return self.pixel_values([opened])

    def _encode_batch(self, batch: list[tuple[ImageInput, Tensor]]) -> tuple[list[ImageInput], Tensor]:
        images = [image for image, _ in batch]
        if feature_table(self.module) is not None:
            return images, self(images)
        return images, self.encode(torch.cat([pixel_values for _, pixel_values in batch]))


def _files(images: Sequence[ImageInput]) -> list[str | PathLike[str]]:
    files = [image for image in images if not isinstance(image, Image)]
    if len(files) < len(images):
        raise DataError(
            "images: got a PIL image, but this model has precomputed features (vision encoder 'features'), which are "
            "found by file name; give image files or image features"
        )
    return files
