"""Generation with images in the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import GenerateBeamDecoderOnlyOutput

from frozenprefix.errors import ConfigError
from frozenprefix.models.fusion import Fusion, Shown
from frozenprefix.models.language_model import encoder_decoder as seq2seq
from frozenprefix.models.language_model.beam_search import BeamSearch, beam_options
from frozenprefix.models.language_model.encoder_decoder import is_seq2seq


class ImageGeneration:
    """`generate` for a model that puts images into the input of a language model. A mixin over its other methods."""

    if TYPE_CHECKING:  # what the model has besides
        language_model: PreTrainedModel
        fusion: Fusion

        @property
        def num_virtual_tokens(self) -> int: ...

        def parts(self) -> tuple[nn.Module, nn.Module, float | None]: ...

        def prefix(self, pixel_values: Tensor | None = None, image_features: Tensor | None = None) -> Tensor | None: ...

        def embed_shown(
            self, input_ids: Tensor | None, prefix_embeds: Tensor | None, attention_mask: Tensor | None = None
        ) -> tuple[Tensor, Shown | None]: ...

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
        """Continue texts with images in them. Pad `input_ids` on the left.

        Args:
            input_ids: int64[B, T], also as first argument; attention_mask: int64[B, T]; as the processor gives them.
            pixel_values or image_features: the images, in reading order; encoded and mapped once each, not per beam.
            args, kwargs: of transformers' `generate`: max_new_tokens, num_beams, do_sample, top_p, …

        Returns:
            int64[B, new tokens]: the continuation only, as transformers does for `inputs_embeds`. Plain beam search is
            this package's own (`beam_search`), with the same texts and `sequences_scores` but no `scores` of every
            step; ask for `output_logits` to have transformers' search, which also serves all other options.
        """
        if "max_length" in kwargs:
            raise ConfigError("max_length counts the image's prefix for some models; give max_new_tokens instead")
        if attention_mask is not None and bool((attention_mask[:, -1] == 0).any()):
            raise ConfigError("input_ids are padded on the right; generation needs padding_side='left'")
        input_ids = inputs if input_ids is None else input_ids
        prefix_embeds = self.prefix(pixel_values, image_features)
        if is_seq2seq(self.language_model) and input_ids is not None:
            return seq2seq.generate(self, input_ids, prefix_embeds, attention_mask, args, kwargs)
        inputs_embeds, shown = self.embed_shown(input_ids, prefix_embeds, attention_mask)
        if attention_mask is None:
            attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        self.parts()  # checked at the first call, by a pass that must not meet these images
        with self.fusion.showing(shown):
            return self._generate(inputs_embeds, attention_mask, args, kwargs)

    def _generate(
        self, inputs_embeds: Tensor, attention_mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """By this package's beam search where it follows all options, else by transformers."""
        options = None
        if not args and not (self.fusion.every_step and self.fusion.shown is not None):
            options = beam_options(self.language_model, inputs_embeds.shape[1] + self.num_virtual_tokens, kwargs)
        if options is not None:
            search = BeamSearch(self.language_model, self.parts(), options, self.num_virtual_tokens)
            sequences, scores = search(inputs_embeds, attention_mask)
            made = GenerateBeamDecoderOnlyOutput(cast(torch.LongTensor, sequences), cast(torch.FloatTensor, scores))
            return made if options.as_dict else sequences
        language_model = cast(Any, self.language_model)
        return language_model.generate(
            None, *args, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
        )
