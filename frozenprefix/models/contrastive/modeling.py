"""A locked image encoder, and a text tower that is trained to match it (LiT, Zhai et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput
from typing_extensions import Self

from frozenprefix.errors import ConfigError
from frozenprefix.kernels.compat import follow_attention
from frozenprefix.models.base import ImageModel
from frozenprefix.models.contrastive.configuration import LockedImageTextConfig, ProjectionConfig
from frozenprefix.models.contrastive.losses import LogitScale, contrastive_loss
from frozenprefix.models.contrastive.text_tower import TextTower, build_text_tower, text_tower_from_architecture
from frozenprefix.models.freezing import freeze
from frozenprefix.models.loading_options import HUB_OPTIONS
from frozenprefix.models.peft import AdapterSet
from frozenprefix.models.vision import VisionEncoder, build_vision_encoder


@dataclass
class LockedImageTextOutput(ModelOutput):
    """Output of the model.

    Attributes:
        loss: float32 scalar.
        image_embeds, text_embeds: unit vectors, float32[P, D] and float32[T, D].

    Example:
        >>> LockedImageTextOutput(image_embeds=torch.ones(1, 4)).to_tuple()  # without what is None
        (tensor([[1., 1., 1., 1.]]),)
    """

    loss: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


class LockedImageTextModel(ImageModel):
    """A locked vision encoder, a text tower, and projections of both into one space.

    Args:
        config: the parts. Frozen ones are loaded from the places that it names.
        vision_encoder, text_tower: ready-made parts, which are used instead.

    Trained weights stay float32; run the model under autocast for speed. The encoder runs in its section's dtype.

    Example:
        >>> from frozenprefix.models.contrastive.configuration import TextTowerConfig
        >>> section = TextTowerConfig(path="bert")
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        >>> tower = text_tower_from_architecture(section, {"model_type": "bert", "vocab_size": 50, **sizes})
        >>> config = LockedImageTextConfig(text_tower=section, projection_dim=4)
        >>> lit = LockedImageTextModel(config, model.vision_encoder, tower)
        >>> lit.encode_text(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)).shape
        torch.Size([2, 4])
    """

    config_class = LockedImageTextConfig
    config: LockedImageTextConfig
    part_names = ("vision_encoder", "text_tower")

    def __init__(
        self,
        config: LockedImageTextConfig,
        vision_encoder: VisionEncoder | None = None,
        text_tower: TextTower | None = None,
    ):
        super().__init__(config)
        identity = {}
        if vision_encoder is None:
            built = build_vision_encoder(config.vision_encoder)
            vision_encoder, identity["vision_encoder"] = built.module, built.identity
        if text_tower is None:
            text = build_text_tower(config.text_tower)
            text_tower, identity["text_tower"] = text.module, text.identity
        self.use_identity(identity)

        self.vision_encoder = freeze(vision_encoder)
        self.text_tower = text_tower
        size = config.projection_dim
        image_projection = config.image_projection
        text_projection = config.text_projection
        self.image_projection = build_projection(image_projection, vision_encoder.encoder_dim, size, "image_projection")
        self.text_projection = build_projection(text_projection, text_tower.output_dim, size, "text_projection")
        self.logit_scale = LogitScale(config.objective)
        self.adapters = AdapterSet()  # none: the whole tower may be trained
        follow_attention(config, None)
        self.post_init()

    def train(self, mode: bool = True) -> LockedImageTextModel:
        """Set the mode of trained parts; frozen ones, including frozen text layers, stay in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    def encode(self, pixel_values: Tensor) -> Tensor:
        """float[P, 3, H, W] -> image_features: float[P, N, D_enc]."""
        with torch.no_grad():
            return self.vision_encoder(pixel_values)

    def encode_image(self, pixel_values: Tensor | None = None, image_features: Tensor | None = None) -> Tensor:
        """Images, float[P, 3, H, W], or their features, float[P, N, D_enc] -> unit vectors float32[P, D]."""
        if (pixel_values is None) == (image_features is None):
            raise ConfigError("encode_image: give pixel_values or image_features, one of the two")
        if pixel_values is not None:
            image_features = self.encode(pixel_values)
        assert image_features is not None
        self.check_features(image_features)
        # [P, N, D_enc] -> [P, D]
        return F.normalize(self.image_projection(image_features.float().mean(dim=1)).float(), dim=-1)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64[T, L] and int64[T, L], 0 on padding -> unit vectors float32[T, D]."""
        return F.normalize(self.text_projection(self.text_tower(input_ids, attention_mask)).float(), dim=-1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        text_image: Tensor | None = None,
    ) -> LockedImageTextOutput:
        """Embed images and texts, and compare them.

        Args:
            text_image: int64[T], the place in the batch of the image that each text describes; text i describes
                image i when not given; then there must be as many texts as images.
        """
        images = self.encode_image(pixel_values, image_features)
        texts = self.encode_text(input_ids, attention_mask)
        places = torch.arange(len(images), device=images.device)
        if text_image is None and len(texts) != len(images):
            raise ConfigError(f"text_image: got none for {len(images)} images and {len(texts)} texts")
        loss = self.loss(images, texts, places, places if text_image is None else text_image)
        return LockedImageTextOutput(loss, images, texts)

    def loss(self, images: Tensor, texts: Tensor, image_ids: Tensor, text_ids: Tensor) -> Tensor:
        """Contrastive loss over unit vectors of all processes; see `contrastive_loss`."""
        return contrastive_loss(self.config.objective, self.logit_scale, images, texts, image_ids, text_ids)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Self:
        """Load a checkpoint folder or Hub id; see `load_checkpoint`."""
        if not isinstance(config, cls.config_class):
            hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            config = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub)
        section = config.text_tower
        # a text tower that was trained as a whole is in the checkpoint; the weights it started from are not needed
        if "text_tower" not in kwargs and section.trained_layers == "all" and config.text_config is not None:
            kwargs["text_tower"] = text_tower_from_architecture(section, config.text_config)
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)


def build_projection(config: ProjectionConfig, input_dim: int, output_dim: int, name: str) -> nn.Module:
    """float[n, input_dim] -> float[n, output_dim].

    Raises:
        ConfigError: for no projection between sizes that differ.
    """
    if config.type == "none":
        if input_dim != output_dim:
            raise ConfigError(
                f"{name}: type 'none' needs projection_dim {input_dim}, the tower's own size; got {output_dim}"
            )
        return nn.Identity()
    hidden = config.hidden_dim or 2 * output_dim
    layers: list[nn.Module] = [nn.LayerNorm(input_dim)] if config.input_norm else []
    layers += [nn.Dropout(config.dropout)] if config.dropout else []
    if config.type == "linear":
        return nn.Sequential(*layers, nn.Linear(input_dim, output_dim, bias=False))
    return nn.Sequential(*layers, nn.Linear(input_dim, hidden), nn.GELU(), nn.Linear(hidden, output_dim, bias=False))
