"""The model: encode → map → fuse → language model, as a transformers model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from frozenprefix.errors import ConfigError, DataError
from frozenprefix.kernels.compat import CACHE
from frozenprefix.models.checkpoint import AdaptedCheckpoint, check_identity
from frozenprefix.models.configuration import (
    FrozenPrefixConfig,
)
from frozenprefix.models.contrastive.heads import ContrastiveHeads, ImageTextEmbedding
from frozenprefix.models.freezing import freeze
from frozenprefix.models.fusion import Shown, build_fusion, index_placeholders
from frozenprefix.models.generation import ImageGeneration
from frozenprefix.models.language_model import encoder_decoder as seq2seq
from frozenprefix.models.language_model.decoder_only import RowReading
from frozenprefix.models.language_model.encoder_decoder import check_seq2seq, is_seq2seq
from frozenprefix.models.language_model.loading import (
    embedding_rms,
    fuse_activations,
    load_language_model,
    positions_from_mask,
    start_token,
    word_embeddings,
)
from frozenprefix.models.mappers import build_mapper
from frozenprefix.models.packing.trie import PackedBatch
from frozenprefix.models.peft.adapter_set import freeze_around, split_peft_model
from frozenprefix.models.vision import VisionEncoder, build_vision_encoder
from frozenprefix.models.vision.training import train_encoder


@dataclass
class FrozenPrefixOutput(ModelOutput):
    """Output of the model.

    Attributes:
        loss: float32 scalar, mean over trained tokens.
        logits: float[B, T, V]; None for a packed batch.
        cache: the LM's keys and values.
        prefix_embeds: float[images, P, D_lm].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Any = None
    prefix_embeds: Tensor | None = None


class FrozenPrefixForConditionalGeneration(
    AdaptedCheckpoint, RowReading, ImageTextEmbedding, ImageGeneration, PreTrainedModel, GenerationMixin
):
    """A frozen vision encoder, a trainable mapper, and a frozen causal LM that the fusion shows the mapper's output.

    Args:
        config: what to build. Frozen parts are loaded from where the config says.
        vision_encoder, language_model: ready-made parts instead (a `VisionEncoder`, any causal or
            encoder-decoder LM of transformers, or a
            peft model around one, whose adapter stays as trainable or frozen as it is).

    The mapper's weights stay float32; the LM and the encoder run in the dtype that their config sections name.
    """

    config_class = FrozenPrefixConfig
    part_names = ("vision_encoder", "language_model")
    config: FrozenPrefixConfig
    vision_encoder: VisionEncoder
    language_model: PreTrainedModel
    mapper: nn.Module
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]  # noqa: RUF012 - transformers reads it from the class
    # transformers' checkpointing does nothing in evaluation mode, in which the frozen LM always is
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(
        self,
        config: FrozenPrefixConfig,
        vision_encoder: VisionEncoder | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        identity = {}
        if vision_encoder is None:
            built = build_vision_encoder(config.vision_encoder)
            vision_encoder, identity["vision_encoder"] = built.module, built.identity
        if language_model is None:
            section = config.language_model
            language_model, identity["language_model"] = load_language_model(section)
        language_model, peft_model = split_peft_model(language_model)
        if is_seq2seq(language_model):
            check_seq2seq(language_model)
        check_identity(config.identity, identity)
        config.identity = {**config.identity, **identity}

        self.vision_encoder = self._freeze_encoder(vision_encoder)
        self.language_model = freeze_around(fuse_activations(language_model), peft_model)
        self.add_adapters(peft_model)
        lm_dim = word_embeddings(language_model).weight.shape[1]
        self.mapper = build_mapper(
            config.mapper,
            encoder_dim=vision_encoder.encoder_dim,
            num_tokens=vision_encoder.num_tokens,
            lm_dim=lm_dim,
            embedding_rms=embedding_rms(language_model),
        )
        self.fusion = build_fusion(config.fusion, language_model, lm_dim)
        heads = config.contrastive
        self.contrastive = None if heads is None else ContrastiveHeads(lm_dim, dim=heads.dim, loss=heads.loss)
        self._start_token = None if self.fusion.is_prefix else start_token(language_model)
        self._decoder_and_head: tuple[nn.Module, nn.Module, float | None] | None = None
        self.generation_config = language_model.generation_config
        self.post_init()

    def _freeze_encoder(self, vision_encoder: VisionEncoder) -> VisionEncoder:
        if self.config.vision_encoder is None:
            return freeze(vision_encoder)
        section = self.config.vision_encoder
        return train_encoder(vision_encoder, section.trainable, getattr(torch, section.dtype))

    def init_weights(self) -> None:
        """Parts arrive with their weights; transformers' own initialisation must not touch them."""

    def train(self, mode: bool = True) -> FrozenPrefixForConditionalGeneration:
        """Set the mapper's mode; frozen parts stay in evaluation mode, around their adapters."""
        super().train(mode)
        for name in self.part_names:
            getattr(self, name).eval()
        for adapter in self.adapters.values():
            adapter.train(mode)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.language_model.dtype

    def encode(self, pixel_values: Tensor) -> Tensor:
        """float[images, 3, H, W] -> image_features: float[images, N, D_enc], with a gradient if any is trained."""
        trained = any(parameter.requires_grad for parameter in self.vision_encoder.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return self.vision_encoder(pixel_values)

    def map_features(self, image_features: Tensor) -> Tensor:
        """float[images, N, D_enc] -> prefix_embeds: float[images, P, D_lm].

        The mapper's float32 weights are used in the LM's compute dtype, through autocast.
        """
        expected = (self.vision_encoder.num_tokens, self.vision_encoder.encoder_dim)
        if image_features.ndim != 3 or tuple(image_features.shape[1:]) != expected:
            raise ConfigError(
                f"image_features: got shape {tuple(image_features.shape)}, "
                f"expected (images, {expected[0]}, {expected[1]})"
            )
        image_features = image_features.float()
        if self.config.unit_features:
            image_features = F.normalize(image_features, dim=-1)
        half = self.compute_dtype != torch.float32
        with torch.autocast(image_features.device.type, dtype=self.compute_dtype if half else None, enabled=half):
            return self.mapper(image_features)

    def prefix(self, pixel_values: Tensor | None = None, image_features: Tensor | None = None) -> Tensor | None:
        """Prefix embeddings of images, or of features made earlier; None without either."""
        if pixel_values is not None and image_features is not None:
            raise ConfigError("give pixel_values or image_features, not both")
        if pixel_values is not None:
            image_features = self.encode(pixel_values)
        return None if image_features is None else self.map_features(image_features)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        packed: PackedBatch | None = None,
        cache: Any = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> FrozenPrefixOutput:
        """Run the model on a plain batch, or on a packed one (`packed` alone, without `input_ids`).

        Args:
            input_ids: int64[B, T] with `prefix_length` placeholders per image.
            pixel_values: float[images, 3, H, W], or image_features: float[images, N, D_enc].
            attention_mask: int64[B, T], 0 on padding (either side).
            labels: int64[B, T], -100 where nothing is learned; shifted inside, as in transformers. With an
                encoder-decoder LM int64[B, L], what its decoder writes.

        Raises:
            DataError: when placeholders and images do not match.
        """
        cache = kwargs.pop("past_key_values", cache)  # its name before transformers 5.24
        # [images, 3, H, W] -> [images, N, D_enc] -> [images, P, D_lm]
        prefix_embeds = self.prefix(pixel_values, image_features)
        if packed is not None:
            penalty = self.adapter_penalty() if self.training else 0.0
            return FrozenPrefixOutput(self.packed_loss(packed, prefix_embeds) + penalty, prefix_embeds=prefix_embeds)
        if is_seq2seq(self.language_model):
            made = seq2seq.forward(self, input_ids, prefix_embeds, attention_mask, labels)
            return FrozenPrefixOutput(*made, None, prefix_embeds)
        # [B, T] -> [B, T, D_lm]
        inputs_embeds, shown = self.embed_shown(input_ids, prefix_embeds, attention_mask)
        if position_ids is None and attention_mask is not None and cache is None:
            position_ids = positions_from_mask(attention_mask)
        # -> [B, T, V]
        with self.fusion.showing(shown):
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                logits_to_keep=logits_to_keep,
                **{CACHE: cache},
                **kwargs,
            )
        loss = None
        if labels is not None:
            loss = self.loss_function(outputs.logits, labels, vocab_size=outputs.logits.shape[-1])
        return FrozenPrefixOutput(loss, outputs.logits, outputs.get(CACHE), prefix_embeds)

    def embed(
        self, input_ids: Tensor | None, prefix_embeds: Tensor | None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Word and prefix embeddings in one sequence: int64[B, T] -> float[B, T, D_lm]."""
        return self.embed_shown(input_ids, prefix_embeds, attention_mask)[0]

    def embed_shown(
        self, input_ids: Tensor | None, prefix_embeds: Tensor | None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Shown | None]:
        """As `embed`, with what `fusion.showing` needs to know while the LM reads the embeddings."""
        image_token_id = self.config.image_token_id
        if input_ids is None or image_token_id is None:
            missing = "input_ids" if input_ids is None else "config.image_token_id"
            raise DataError(f"{missing}: got None; the processor gives input_ids, and knows the id of <image>")
        if attention_mask is not None and attention_mask.ndim == 2:
            # a padding token may have been added to the tokenizer alone, behind the LM's vocabulary
            input_ids = input_ids.masked_fill(attention_mask[:, -input_ids.shape[1] :] == 0, 0)
        per_image = self.placeholders_per_image
        images = 0 if prefix_embeds is None else len(prefix_embeds)
        prefix_index = index_placeholders(input_ids, image_token_id, images * per_image)
        inputs_embeds = self.fuse(input_ids, prefix_index, prefix_embeds)
        if prefix_embeds is None:
            return inputs_embeds, None
        latest = prefix_index.cummax(dim=1).values
        return inputs_embeds, Shown(prefix_embeds, prefix_index, latest.div(per_image, rounding_mode="floor"))

    @property
    def placeholders_per_image(self) -> int:
        """Places that an image takes in the text."""
        return self.fusion.placeholders(self.config.prefix_length)
