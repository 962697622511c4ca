"""The model: encode → map → fuse → language model, as a transformers model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from frozenprefix.errors import ConfigError, DataError
from frozenprefix.kernels.compat import CACHE, follow_attention
from frozenprefix.kernels.precision import autocast_to
from frozenprefix.models.base import ImageModel
from frozenprefix.models.configuration import FrozenPrefixConfig
from frozenprefix.models.contrastive.heads import ContrastiveHeads
from frozenprefix.models.freezing import freeze
from frozenprefix.models.fusion import ImageContext, build_fusion, fuse_prefix, index_placeholders
from frozenprefix.models.language_model import embedding_rms, load_language_model, wrap_language_model
from frozenprefix.models.language_model.base import BeamOptions, check_generate_arguments
from frozenprefix.models.language_model.loading import language_model_identity
from frozenprefix.models.mappers import build_mapper
from frozenprefix.models.packing import PackedBatch
from frozenprefix.models.peft import AdapterSet
from frozenprefix.models.peft.adapter_set import freeze_around, split_peft_model
from frozenprefix.models.serving import servable
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


@servable
class FrozenPrefixForConditionalGeneration(ImageModel, GenerationMixin):
    """A frozen vision encoder, a trainable mapper, and a frozen LM into which a fusion puts the mapper's output.

    Args:
        config: the parts. Frozen ones are loaded from the places that it names.
        vision_encoder, language_model: ready-made parts, used instead: a `VisionEncoder`; any causal or
            encoder-decoder LM of transformers, or a peft model around one, whose adapter stays trainable or frozen.

    The mapper's weights stay float32; the LM and the encoder run in the dtype that their config sections name.

    Attributes:
        vision_encoder, mapper, fusion: images -> features -> prefix embeddings -> into the LM.
        lm: the frozen language model, a `FrozenLM`.
        adapters: peft's adapters in the frozen parts, an `AdapterSet`.
        contrastive: heads for `encode_image` and `encode_text`, or None.

    Example:
        >>> inputs = processor(image, "<image>", return_tensors="pt")
        >>> model.generate(**inputs, max_new_tokens=4).shape
        torch.Size([1, 4])
        >>> model(**inputs).logits.shape  # a prefix of 2, and 300 words
        torch.Size([1, 2, 300])
    """

    config_class = FrozenPrefixConfig
    config: FrozenPrefixConfig
    part_names = ("vision_encoder", "language_model")
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
            language_model, identity["language_model"] = load_language_model(config.language_model)
        language_model, peft_model = split_peft_model(language_model)
        identity.setdefault("language_model", language_model_identity(language_model))
        self.use_identity(identity)

        self.vision_encoder = self._freeze_encoder(vision_encoder)
        self.lm = wrap_language_model(freeze_around(language_model, peft_model))
        # before the fusion, whose hooks then run outside of peft's layers
        self.adapters = AdapterSet.from_config(config, language_model, vision_encoder, peft_model)
        self.lm.num_virtual_tokens = self.adapters.num_virtual_tokens
        self.mapper = build_mapper(
            config.mapper,
            encoder_dim=vision_encoder.encoder_dim,
            num_tokens=vision_encoder.num_tokens,
            lm_dim=self.lm.dim,
            embedding_rms=embedding_rms(language_model),
        )
        self.fusion = build_fusion(config.fusion, language_model, self.lm.dim)
        self.adapters.follow(self.fusion)
        heads = config.contrastive
        self.contrastive = None if heads is None else ContrastiveHeads(self.lm.dim, dim=heads.dim, loss=heads.loss)
        self._start_token = None if self.fusion.is_prefix else self.lm.start_token
        follow_attention(config, language_model)
        self.post_init()

    def _freeze_encoder(self, vision_encoder: VisionEncoder) -> VisionEncoder:
        if self.config.vision_encoder is None:
            return freeze(vision_encoder)
        config = self.config.vision_encoder
        return train_encoder(vision_encoder, config.trainable, getattr(torch, config.dtype))

    # ── encode → map → fuse → language model ──

    def encode(self, pixel_values: Tensor) -> Tensor:
        """float[images, 3, H, W] -> image_features: float[images, N, D_enc], with a gradient if any is trained."""
        trained = any(parameter.requires_grad for parameter in self.vision_encoder.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return self.vision_encoder(pixel_values)

    def map_features(self, image_features: Tensor) -> Tensor:
        """float[images, N, D_enc] -> prefix_embeds: float[images, P, D_lm].

        The mapper's float32 weights are used in the LM's dtype, through autocast.
        """
        self.check_features(image_features)
        image_features = image_features.float()
        if self.config.unit_features:
            image_features = F.normalize(image_features, dim=-1)
        with autocast_to(self.lm.dtype, image_features.device):
            return self.mapper(image_features)

    def prefix(self, pixel_values: Tensor | None = None, image_features: Tensor | None = None) -> Tensor | None:
        """Prefix embeddings float[images, P, D_lm] of images or of their features; None without either."""
        if pixel_values is not None and image_features is not None:
            raise ConfigError("give pixel_values or image_features, not both")
        if pixel_values is not None:
            image_features = self.encode(pixel_values)
        return None if image_features is None else self.map_features(image_features)

    def fuse(
        self, input_ids: Tensor | None, prefix_embeds: Tensor | None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, ImageContext | None]:
        """Put images into a text: int64[B, T] -> inputs_embeds: float[B, T, D_lm].

        Returns:
            The embeddings, and which image each token sees, for `fusion.seeing` while the LM reads them.
        """
        image_token_id = self.config.image_token_id
        if input_ids is None or image_token_id is None:
            missing = "input_ids" if input_ids is None else "config.image_token_id"
            raise DataError(f"{missing}: got None; the processor gives input_ids, and knows the id of <image>")
        if attention_mask is not None and attention_mask.ndim == 2:
            # the tokenizer may pad with an added token, whose id is outside the LM's vocabulary
            input_ids = input_ids.masked_fill(attention_mask[:, -input_ids.shape[1] :] == 0, 0)
        images = 0 if prefix_embeds is None else len(prefix_embeds)
        prefix_index = index_placeholders(input_ids, image_token_id, images * self.placeholders_per_image)
        return self._fuse_at(input_ids, prefix_index, prefix_index.cummax(dim=1).values, prefix_embeds)

    def _fuse_at(
        self, input_ids: Tensor, prefix_index: Tensor, latest_index: Tensor, prefix_embeds: Tensor | None
    ) -> tuple[Tensor, ImageContext | None]:
        """As `fuse`, with known placeholders; the indices are those of `PackedBatch`."""
        if self._start_token is None:
            inputs_embeds = fuse_prefix(self.lm.embed, input_ids, prefix_index, prefix_embeds)
        else:  # the placeholder only marks the place of the image, but the LM has to read some word there
            inputs_embeds = self.lm.embed(input_ids.masked_fill(prefix_index >= 0, self._start_token))
        if prefix_embeds is None:
            return inputs_embeds, None
        # number of the latest placeholder -> number of its image; -1 stays -1
        image = latest_index.div(self.placeholders_per_image, rounding_mode="floor")
        return inputs_embeds, ImageContext(prefix_embeds, prefix_index, image)

    @property
    def placeholders_per_image(self) -> int:
        """Places that an image takes in the text."""
        return self.fusion.placeholders(self.config.prefix_length)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        packed: PackedBatch | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> FrozenPrefixOutput:
        """Run the model on a plain batch, or on a packed one (`packed` alone, without `input_ids`).

        Args:
            input_ids: int64[B, T] with `prefix_length` placeholders per image.
            pixel_values: float[images, 3, H, W], or image_features: float[images, N, D_enc].
            attention_mask: int64[B, T], 0 on padding (either side).
            labels: int64[B, T], -100 where nothing is learned; shifted inside, as in transformers. With an
                encoder-decoder LM int64[B, L], what its decoder writes.
            kwargs: further arguments of the LM: `position_ids`, `logits_to_keep`, …

        Raises:
            DataError: when placeholders and images do not match.
        """
        # [images, 3, H, W] -> [images, N, D_enc] -> [images, P, D_lm]
        prefix_embeds = self.prefix(pixel_values, image_features)
        if packed is not None:
            penalty = self.adapters.penalty() if self.training else 0.0
            return FrozenPrefixOutput(self.packed_loss(packed, prefix_embeds) + penalty, prefix_embeds=prefix_embeds)
        if input_ids is not None:
            input_ids, attention_mask = self.lm.prompt(input_ids, attention_mask)
        # [B, T] -> [B, T, D_lm]
        inputs_embeds, context = self.fuse(input_ids, prefix_embeds, attention_mask)
        kwargs[CACHE] = kwargs.pop("past_key_values", cache)  # its name before transformers 5.24
        # [B, T, D_lm] -> [B, T, V]
        with self.fusion.seeing(context):
            output = self.lm(inputs_embeds, attention_mask, labels, **kwargs)
        return FrozenPrefixOutput(output.loss, output.logits, output.cache, prefix_embeds)

    def packed_loss(
        self,
        packed: PackedBatch,
        prefix_embeds: Tensor | None,
        *,
        label_smoothing: float = 0.0,
        word_dropout: float = 0.0,
    ) -> Tensor:
        """Mean loss over the trained tokens of packed rows: a float32 scalar.

        Args:
            label_smoothing: share of a token's probability that is spread evenly over the vocabulary.
            word_dropout: share of the target's words that the LM reads as zeros (Bowman et al. 2016, section 3.1), so
                that it has to rely on the image; causal LMs only.
        """
        with self.reading(packed, prefix_embeds) as (rows, inputs_embeds):
            if word_dropout:
                inputs_embeds = inputs_embeds.masked_fill(packed.draw_words(word_dropout)[..., None], 0.0)
            return self.lm.loss(rows, inputs_embeds, label_smoothing) / packed.num_tokens

    def packed_hidden(self, packed: PackedBatch, prefix_embeds: Tensor | None) -> Tensor:
        """Last hidden states at the nodes of packed rows that predict something: float[K, D_lm].

        Raises:
            ConfigError: when several texts share a row that this LM cannot read.
        """
        with self.reading(packed, prefix_embeds) as (rows, inputs_embeds):
            return self.lm.hidden(rows, inputs_embeds)

    @contextmanager
    def reading(self, packed: PackedBatch, prefix_embeds: Tensor | None) -> Iterator[tuple[Any, Tensor]]:
        """The LM's layout of packed rows and their embeddings; inside the block the LM's hooks see the images."""
        rows = self.lm.layout(packed)
        inputs_embeds, context = self._fuse_at(rows.input_ids, rows.prefix_index, rows.latest_index, prefix_embeds)
        with self.fusion.seeing(context):
            yield rows, inputs_embeds

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        packed: PackedBatch | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue texts with images in them. Pad `input_ids` on the left.

        Args:
            input_ids: int64[B, T], also as first argument; attention_mask: int64[B, T]; as the processor gives them.
            packed: in place of both, prompts that share rows, from `pack_prompts`; see `searches_rows`.
            pixel_values or image_features: the images, in reading order; encoded and mapped once each, not per beam.
            args, kwargs: of transformers' `generate`: max_new_tokens, num_beams, do_sample, top_p, …

        Returns:
            int64[B, new tokens]: the continuation only, as transformers does for `inputs_embeds`. Plain greedy and beam
            search are this package's own (`beam_search`), with the same texts, `sequences_scores` also for greedy ones,
            and no `scores` of every step; ask for `output_logits` to have transformers' search, which also serves all
            other options.
        """
        # transformers' second argument by position
        check_generate_arguments(attention_mask, {"generation_config": args[0], **kwargs} if args else kwargs)
        input_ids = inputs if input_ids is None else input_ids
        prefix_embeds = self.prefix(pixel_values, image_features)
        if packed is not None:
            return self._continue_rows(packed, prefix_embeds, kwargs)
        if input_ids is not None:
            input_ids, attention_mask = self.lm.prompt(input_ids, attention_mask)
        inputs_embeds, context = self.fuse(input_ids, prefix_embeds, attention_mask)
        beams = None if args else self.search_options(inputs_embeds.shape[1], kwargs, sees_images=context is not None)
        with self.fusion.seeing(context):
            return self.lm.generate(inputs_embeds, attention_mask, *args, beams=beams, **kwargs)

    def searches_rows(self, longest: int, *, sees_images: bool = True, **options: Any) -> bool:
        """Whether `generate` takes packed prompts with these options: prompts of up to `longest` tokens.

        Example:
            >>> model.searches_rows(20, max_new_tokens=5), model.searches_rows(20, max_new_tokens=5, do_sample=True)
            (True, False)
        """
        return self.search_options(longest, options, sees_images=sees_images) is not None

    def search_options(self, longest: int, options: dict[str, Any], *, sees_images: bool) -> BeamOptions | None:
        """Options of this package's search; None where transformers has to search."""
        return None if sees_images and self.fusion.every_step else self.lm.beam_options(longest, options)

    def _continue_rows(self, packed: PackedBatch, prefix_embeds: Tensor | None, options: dict[str, Any]) -> Any:
        longest = int(packed.position_ids.max()) + 1
        beams = self.search_options(longest, options, sees_images=prefix_embeds is not None)
        if beams is None:
            raise ConfigError(
                "generate: packed: this model or these options need transformers' search, which reads one prompt a "
                "row; ask searches_rows first, and give input_ids"
            )
        with self.reading(packed, prefix_embeds) as (rows, inputs_embeds):
            return self.lm.continue_rows(rows, inputs_embeds, beams)

    # ── images and texts in one space ──

    @property
    def heads(self) -> ContrastiveHeads:
        """The contrastive heads.

        Raises:
            ConfigError: for a model that was trained without them.
        """
        if self.contrastive is None:
            raise ConfigError(
                "encode_image and encode_text: this model was trained without a contrastive objective; train it with "
                "objectives.contrastive"
            )
        return self.contrastive

    def encode_image(self, pixel_values: Tensor | None = None, image_features: Tensor | None = None) -> Tensor:
        """Images float[B, 3, H, W], or their features float[B, N, D_enc] -> unit vectors float32[B, dim]."""
        prefix_embeds = self.prefix(pixel_values, image_features)
        if prefix_embeds is None:
            raise ConfigError("encode_image: give pixel_values or image_features, one of the two")
        return self.heads.embed_prefix(prefix_embeds)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Texts int64[B, T], as `processor.prepare_texts` gives them -> unit vectors float32[B, dim].

        Gradients pass through the LM only where something in it is trained.
        """
        heads = self.heads
        self.lm.check_length(input_ids.shape[1], what="encode_text: a text")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_text):
            states = self.lm.text_states(input_ids, attention_mask)
        return heads.embed_text(states, attention_mask)

    @property
    def trains_text(self) -> bool:
        """Whether training changes the LM's output for text without images."""
        return self.fusion.changes_text or any(p.requires_grad for p in self.lm.parameters())

    @contextmanager
    def bare_language_model(self) -> Iterator[None]:
        """Switch adapters and fusion off inside the block: the LM's output is that of the bare LM."""
        with self.adapters.disabled(), self.fusion.disabled():
            yield

    # ── as a transformers model ──

    @property
    def generation_config(self) -> Any:
        """The language model's generation config, which `generate` follows."""
        return self.language_model.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        if "lm" in self._modules:  # transformers' constructor sets one before there is a language model
            self.language_model.generation_config = config

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model inside `lm`."""
        return self.lm.model

    def train(self, mode: bool = True) -> FrozenPrefixForConditionalGeneration:
        """Set the mode of the trained parts; frozen parts stay in evaluation mode, around their adapters."""
        super().train(mode)
        self.vision_encoder.eval()
        self.lm.eval()
        self.adapters.train(mode)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def unload_adapters(self) -> None:
        """Merge the language model's adapter into its weights for good, which leaves a plain transformers model.

        Save the result with `save_pretrained(folder, self_contained=True)`, or `language_model.save_pretrained`.

        Raises:
            ConfigError: for virtual tokens, quantised weights, and a model without such an adapter.
        """
        self.adapters.unload("language_model")
        if self.config.language_model is not None:
            self.config.language_model = self.config.language_model.model_copy(update={"peft": None})
