"""A checkpoint that is to be exported: loaded in float32, and checked for what other engines have no place for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from frozenprefix.errors import ConfigError, ExportError
from frozenprefix.export.mlp import PlainMLP, plain_mlp
from frozenprefix.export.vit import PlainViT, plain_vit
from frozenprefix.inference.captioner import Captioner
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.processing import FrozenPrefixProcessor


@dataclass(frozen=True)
class Source:
    """A checkpoint in float32.

    Args:
        checkpoint: folder or Hub id.
        model, processor: as loaded.

    Example:
        >>> source = Source.load(checkpoint)
        >>> source.prefix(image).shape
        torch.Size([2, 32])
        >>> len(source.greedy(image, max_new_tokens=3)) <= 3
        True
    """

    checkpoint: str
    model: FrozenPrefixForConditionalGeneration
    processor: FrozenPrefixProcessor

    @classmethod
    def load(cls, checkpoint: str | Path, language_model: str | Path | None = None) -> Source:
        """Load a checkpoint whose prefix is all that its language model reads of an image.

        Raises:
            ExportError: for trained parts in the language model, for other fusions, and for normalized features.
        """
        captioner = Captioner.from_pretrained(checkpoint, device="cpu", precision="fp32", language_model=language_model)
        source = cls(str(checkpoint), captioner.model, captioner.processor)
        source.check()
        return source

    def check(self) -> None:
        """Raise `ExportError` with everything that is more than prefix embeddings in a plain language model."""
        config: Any = self.model.config
        embeds = "use this package for it"
        if config.fusion.type != "prefix":
            raise ExportError(
                f"model.fusion.type: got '{config.fusion.type}', which changes the language model inside; other "
                f"engines read prefix embeddings: train with fusion 'prefix', or {embeds}"
            )
        for part in ("language_model", "vision_encoder"):
            if getattr(getattr(config, part, None), "peft", None) is not None:
                raise ExportError(
                    f"model.{part}.peft: its adapter is not part of what is exported; merge it with "
                    f"`model.unload_adapters()` and save the result with self_contained=True, or {embeds}"
                )

    @property
    def captioner(self) -> Captioner:
        return Captioner(self.model, self.processor, batch_size=4)

    @property
    def image_size(self) -> int:
        return self.model.vision_encoder.image_size

    def vit(self) -> PlainViT:
        """The encoder, as other engines have it."""
        if self.model.config.unit_features:
            raise ExportError("unit_features: got true, a scaling of the features that other engines do not have")
        return plain_vit(self.model.vision_encoder)

    def mlp(self) -> PlainMLP:
        """The mapper, as other engines have it."""
        return plain_mlp(self.model.mapper, self.model.vision_encoder.num_tokens, self.model.config.prefix_length)

    def prompt(self) -> str:
        """The prompt of the training's captions."""
        return self.processor.prompt_for("caption")

    @torch.no_grad()
    def pixel_values(self, image: Image.Image) -> Tensor:
        """float32[1, 3, H, W]."""
        return self.processor.image_processor(image, return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def prefix(self, image: Image.Image) -> Tensor:
        """Prefix embeddings float32[P, D_lm] of one image."""
        prefix_embeds = self.model.prefix(self.pixel_values(image))
        assert prefix_embeds is not None
        return prefix_embeds[0]

    @torch.no_grad()
    def prompt_embeds(self, prompt: str, image_features: Tensor) -> Tensor:
        """All that the language model reads, float32[T, D_lm]: the words' embeddings and the prefix."""
        ids = torch.tensor([self.processor.encode_prompt(prompt)])
        embeds, _ = self.model.fuse(ids, self.model.map_features(image_features))
        return embeds[0]

    @torch.no_grad()
    def greedy(self, image: Image.Image, max_new_tokens: int) -> list[int]:
        """Token ids of the image's greedy caption, up to the end token and with it."""
        inputs = self.processor(image, self.prompt(), return_tensors="pt")
        ends = self.end_tokens
        ids = self.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            num_beams=1,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )[0].tolist()
        return until_end(ids, ends)

    @property
    def end_tokens(self) -> list[int]:
        from frozenprefix.models.language_model import end_tokens

        return end_tokens(self.model, self.processor.tokenizer)


def until_end(ids: list[int], ends: list[int]) -> list[int]:
    """Token ids up to the first end token, and with it.

    Example:
        >>> until_end([5, 2, 2], [2])
        [5, 2]
    """
    stop = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def built_in_images(size: int) -> list[Image.Image]:
    """Two drawings of `size` x `size` pixels, for a verification without photos.

    Example:
        >>> [drawing.size for drawing in built_in_images(32)]
        [(32, 32), (32, 32)]
    """
    if size < 1:
        raise ConfigError(f"size: got {size}, expected at least 1")
    beach = Image.new("RGB", (size, size), (150, 200, 240))
    draw = ImageDraw.Draw(beach)
    draw.rectangle((0, size * 2 // 3, size, size), fill=(230, 210, 150))
    draw.ellipse((size // 10, size // 10, size // 3, size // 3), fill=(250, 220, 60))
    draw.polygon(
        [(size // 2, size * 2 // 3), (size * 9 // 10, size * 2 // 3), (size * 7 // 10, size // 4)], fill=(200, 40, 40)
    )
    ramp = Image.radial_gradient("L").resize((size, size))
    other = Image.linear_gradient("L").resize((size, size))
    return [beach, Image.merge("RGB", (ramp, other, other.transpose(Image.Transpose.ROTATE_90)))]
