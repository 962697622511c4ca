"""The model: encode → map → fuse → language model, as a transformers model."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import GenerateBeamDecoderOnlyOutput
from transformers.utils import SAFE_WEIGHTS_NAME, ModelOutput, cached_file

from frozenprefix.errors import CheckpointError, ConfigError, DataError
from frozenprefix.models.attention import attention_for_rows, mask_per_kind
from frozenprefix.models.beam_search import BeamSearch, beam_options
from frozenprefix.models.configuration import (
    FrozenPrefixConfig,
    LanguageModelConfig,
    MapperConfig,
    VisionEncoderConfig,
)
from frozenprefix.models.freezing import freeze
from frozenprefix.models.fusion import fuse_prefix, index_placeholders
from frozenprefix.models.language_model import (
    decoder_and_head,
    embedding_rms,
    fuse_activations,
    load_language_model,
    positions_from_mask,
    word_embeddings,
)
from frozenprefix.models.losses import next_token_loss
from frozenprefix.models.mappers import build_mapper
from frozenprefix.models.packing import PackedBatch, ancestor_mask
from frozenprefix.models.vision import VisionEncoder, build_vision_encoder

FROZEN_PARTS = ("vision_encoder", "language_model")


@dataclass
class FrozenPrefixOutput(ModelOutput):
    """Output of the model.

    Attributes:
        loss: float32 scalar, mean over trained tokens.
        logits: float[B, T, V]; None for a packed batch.
        past_key_values: the LM's cache.
        prefix_embeds: float[pictures, P, D_lm].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    prefix_embeds: Tensor | None = None


class FrozenPrefixForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A frozen vision encoder, a trainable mapper, and a frozen causal LM that reads the mapper's output.

    Args:
        config: what to build. Frozen parts are loaded from where the config says.
        vision_encoder, language_model: ready-made parts instead (a `VisionEncoder`, any causal LM of transformers).

    The mapper's weights stay float32; the LM and the encoder run in the dtype that their config sections name.
    """

    config_class = FrozenPrefixConfig
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
            built = build_vision_encoder(VisionEncoderConfig.model_validate(config.vision_encoder))
            vision_encoder, identity["vision_encoder"] = built.module, built.identity
        if language_model is None:
            section = LanguageModelConfig.model_validate(config.language_model)
            language_model, identity["language_model"] = load_language_model(section)
        check_identity(config.identity, identity)
        config.identity = {**config.identity, **identity}

        self.vision_encoder = freeze(vision_encoder)
        self.language_model = freeze(fuse_activations(language_model))
        self.mapper = build_mapper(
            MapperConfig.model_validate(config.mapper),
            encoder_dim=vision_encoder.encoder_dim,
            num_tokens=vision_encoder.num_tokens,
            lm_dim=word_embeddings(language_model).weight.shape[1],
            embedding_rms=embedding_rms(language_model),
        )
        self._decoder_and_head: tuple[nn.Module, nn.Module, float | None] | None = None
        self.generation_config = language_model.generation_config
        self.post_init()

    def init_weights(self) -> None:
        """Parts arrive with their weights; transformers' own initialisation must not touch them."""

    def train(self, mode: bool = True) -> FrozenPrefixForConditionalGeneration:
        """Set the mapper's mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        for name in FROZEN_PARTS:
            getattr(self, name).eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.language_model.dtype

    def encode(self, pixel_values: Tensor) -> Tensor:
        """float[pictures, 3, H, W] -> image_features: float[pictures, N, D_enc]."""
        with torch.no_grad():
            return self.vision_encoder(pixel_values)

    def map_features(self, image_features: Tensor) -> Tensor:
        """float[pictures, N, D_enc] -> prefix_embeds: float[pictures, P, D_lm].

        The mapper's float32 weights are used in the LM's compute dtype, through autocast.
        """
        expected = (self.vision_encoder.num_tokens, self.vision_encoder.encoder_dim)
        if image_features.ndim != 3 or tuple(image_features.shape[1:]) != expected:
            raise ConfigError(
                f"image_features: got shape {tuple(image_features.shape)}, "
                f"expected (pictures, {expected[0]}, {expected[1]})"
            )
        half = self.compute_dtype != torch.float32
        with torch.autocast(image_features.device.type, dtype=self.compute_dtype if half else None, enabled=half):
            return self.mapper(image_features.float())

    def prefix(self, pixel_values: Tensor | None = None, image_features: Tensor | None = None) -> Tensor | None:
        """Prefix embeddings of pictures, or of features made earlier; None without either."""
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
        past_key_values: Any = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> FrozenPrefixOutput:
        """Run the model on a plain batch, or on a packed one (`packed` alone, without `input_ids`).

        Args:
            input_ids: int64[B, T] with `prefix_length` placeholders per picture.
            pixel_values: float[pictures, 3, H, W], or image_features: float[pictures, N, D_enc].
            attention_mask: int64[B, T], 0 on padding (either side).
            labels: int64[B, T], -100 where nothing is learned; shifted inside, as in transformers.

        Raises:
            DataError: when placeholders and pictures do not match.
        """
        # [pictures, 3, H, W] -> [pictures, N, D_enc] -> [pictures, P, D_lm]
        prefix_embeds = self.prefix(pixel_values, image_features)
        if packed is not None:
            return FrozenPrefixOutput(loss=self.packed_loss(packed, prefix_embeds), prefix_embeds=prefix_embeds)
        # [B, T] -> [B, T, D_lm]
        inputs_embeds = self.embed(input_ids, prefix_embeds, attention_mask)
        if position_ids is None and attention_mask is not None and past_key_values is None:
            position_ids = positions_from_mask(attention_mask)
        # -> [B, T, V]
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        loss = None
        if labels is not None:
            loss = self.loss_function(outputs.logits, labels, vocab_size=outputs.logits.shape[-1])
        return FrozenPrefixOutput(loss, outputs.logits, outputs.past_key_values, prefix_embeds)

    def embed(
        self, input_ids: Tensor | None, prefix_embeds: Tensor | None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Word and prefix embeddings in one sequence: int64[B, T] -> float[B, T, D_lm]."""
        image_token_id = self.config.image_token_id
        if input_ids is None or image_token_id is None:
            missing = "input_ids" if input_ids is None else "config.image_token_id"
            raise DataError(f"{missing}: got None; the processor gives input_ids, and knows the id of <image>")
        if attention_mask is not None and attention_mask.ndim == 2:
            # a padding token may have been added to the tokenizer alone, behind the LM's vocabulary
            input_ids = input_ids.masked_fill(attention_mask[:, -input_ids.shape[1] :] == 0, 0)
        available = 0 if prefix_embeds is None else prefix_embeds.shape[0] * prefix_embeds.shape[1]
        prefix_index = index_placeholders(input_ids, image_token_id, available)
        return fuse_prefix(self.get_input_embeddings(), input_ids, prefix_index, prefix_embeds)

    def _parts(self) -> tuple[nn.Module, nn.Module, float | None]:
        """Decoder, head and logit cap of the LM, checked at the first call."""
        if self._decoder_and_head is None:
            self._decoder_and_head = decoder_and_head(self.language_model)
        return self._decoder_and_head

    def packed_loss(self, packed: PackedBatch, prefix_embeds: Tensor | None) -> Tensor:
        """Mean loss over the trained tokens of packed rows: a float32 scalar."""
        decoder, head, softcap = self._parts()
        # [R, T] -> [R, T, D_lm]
        inputs_embeds = fuse_prefix(self.get_input_embeddings(), packed.input_ids, packed.prefix_index, prefix_embeds)
        with attention_for_rows(self.language_model):
            hidden = decoder(
                inputs_embeds=inputs_embeds,
                attention_mask=self._row_mask(packed, inputs_embeds.dtype),
                position_ids=packed.position_ids,
                use_cache=False,
            ).last_hidden_state
        # only the nodes that predict something: -> [K, D_lm] -> scalar
        hidden = hidden.flatten(0, 1)[packed.predict_index]
        total = next_token_loss(
            hidden, head, packed.edge_source, packed.edge_label, packed.edge_weight, softcap=softcap
        )
        return total / packed.num_tokens

    def _row_mask(self, packed: PackedBatch, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """The trie's mask; models with several kinds of layers want it once per kind."""
        mask = ancestor_mask(packed.subtree_end, dtype)
        config = self.language_model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        if window and int(packed.position_ids.max()) >= window:
            raise ConfigError(
                f"a packed text of {int(packed.position_ids.max()) + 1} tokens is longer than the LM's sliding window "
                f"({window}); shorten max_target_tokens or set training.packing=none"
            )
        return mask_per_kind(config, mask)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue texts with pictures in them. Pad `input_ids` on the left.

        Args:
            input_ids: int64[B, T], also as first argument; attention_mask: int64[B, T]; as the processor gives them.
            pixel_values or image_features: the pictures, in reading order; encoded and mapped once each, not per beam.
            args, kwargs: of transformers' `generate`: max_new_tokens, num_beams, do_sample, top_p, …

        Returns:
            int64[B, new tokens]: the continuation only, as transformers does for `inputs_embeds`. Plain beam search is
            this package's own (`beam_search`), with the same texts and `sequences_scores` but no `scores` of every
            step; ask for `output_logits` to have transformers' search, which also serves all other options.
        """
        if "max_length" in kwargs:
            raise ConfigError("max_length counts the picture's prefix for some models; give max_new_tokens instead")
        if attention_mask is not None and bool((attention_mask[:, -1] == 0).any()):
            raise ConfigError("input_ids are padded on the right; generation needs padding_side='left'")
        input_ids = inputs if input_ids is None else input_ids
        inputs_embeds = self.embed(input_ids, self.prefix(pixel_values, image_features), attention_mask)
        if attention_mask is None:
            attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        options = None if args else beam_options(self.language_model, inputs_embeds.shape[1], kwargs)
        if options is not None:
            sequences, scores = BeamSearch(self.language_model, self._parts(), options)(inputs_embeds, attention_mask)
            made = GenerateBeamDecoderOnlyOutput(cast(torch.LongTensor, sequences), cast(torch.FloatTensor, scores))
            return made if options.as_dict else sequences
        language_model = cast(Any, self.language_model)
        return language_model.generate(
            None, *args, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
        )

    def trainable_state(self) -> dict[str, Tensor]:
        """What training changes: every parameter that needs a gradient."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def save_pretrained(
        self,
        save_directory: str | PathLike[Any],
        is_main_process: bool = True,
        state_dict: dict[Any, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Write config.json (with the frozen parts' identity) and model.safetensors (trainable tensors only).

        Args:
            is_main_process: False writes nothing.
            state_dict: values to write in place of the model's own; those of frozen parts are left out.

        Raises:
            ConfigError: for other arguments of transformers' `save_pretrained`, which have no effect here.
        """
        if kwargs.pop("push_to_hub", False):
            raise ConfigError("push_to_hub: save first, then upload the folder with huggingface_hub.upload_folder")
        if args or kwargs:
            given = ", ".join([*map(repr, args), *kwargs])
            raise ConfigError(f"save_pretrained: got {given}, which has no effect on a checkpoint of one small file")
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        own = self.trainable_state()
        state = own if state_dict is None else {name: state_dict[name] for name in own}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        self.config.save_pretrained(folder)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[Any] | None, *args: Any, **kwargs: Any
    ) -> FrozenPrefixForConditionalGeneration:
        """Load a checkpoint folder or Hub id; frozen parts come from where the config says, and must be the same ones.

        Args:
            kwargs: `config`, `vision_encoder`, `language_model` (ready-made parts), `device_map` ("cpu", "cuda", …),
                and the Hub's `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            CheckpointError: for a folder without weights, missing or unexpected keys, wrong shapes, or a frozen part
                that is not the one the mapper was trained with.
        """
        source = str(pretrained_model_name_or_path)
        hub = {k: kwargs.pop(k) for k in ("revision", "token", "cache_dir", "local_files_only") if k in kwargs}
        config = kwargs.pop("config", None)
        if not isinstance(config, FrozenPrefixConfig):
            config = FrozenPrefixConfig.from_pretrained(source, **hub)
        parts = {name: kwargs.pop(name) for name in FROZEN_PARTS if name in kwargs}
        try:
            tensors = load_file(str(cached_file(source, SAFE_WEIGHTS_NAME, **hub)))
        except SafetensorError as error:
            raise CheckpointError(f"{source}: {SAFE_WEIGHTS_NAME} is damaged ({error})") from error
        except OSError as error:
            raise CheckpointError(f"{source} holds no {SAFE_WEIGHTS_NAME}; it is no checkpoint ({error})") from error
        model = cls(config, **parts)
        model.load_trainable(tensors, source=source)
        device = kwargs.pop("device_map", None)
        return model.to(device).eval() if device not in (None, "auto") else model.eval()

    def load_trainable(self, tensors: dict[str, Tensor], *, source: str = "state") -> None:
        """Copy `tensors` into the trainable parameters; the key sets and shapes must be equal."""
        own = self.trainable_state()
        problems = [f"missing {name}" for name in own.keys() - tensors.keys()]
        problems += [f"unexpected {name}" for name in tensors.keys() - own.keys()]
        problems += [
            f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
            for name in own.keys() & tensors.keys()
            if tensors[name].shape != own[name].shape
        ]
        if problems:
            raise CheckpointError(f"{source} does not fit this model: " + "; ".join(sorted(problems)))
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])


def check_identity(saved: dict[str, dict[str, str]], found: dict[str, dict[str, str]]) -> None:
    """Refuse frozen parts other than those a checkpoint was trained with, naming what differs."""
    for part, fields in found.items():
        for field in sorted(saved.get(part, {}).keys() | fields.keys()) if part in saved else ():
            before, now = saved[part].get(field), fields.get(field)
            if before != now:
                raise CheckpointError(
                    f"{part}: this checkpoint was trained with {field}={before!r}, but found {field}={now!r}; "
                    "give the original part, or train a new mapper"
                )
