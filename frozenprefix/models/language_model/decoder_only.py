"""Packed rows through a language model: what training, and the scoring of labels, read."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from frozenprefix.errors import ConfigError
from frozenprefix.kernels.attention import attention_for_rows, mask_per_kind
from frozenprefix.models.fusion import Fusion, Shown, fuse_prefix
from frozenprefix.models.language_model import encoder_decoder as seq2seq
from frozenprefix.models.language_model.loading import check_packable, decoder_and_head
from frozenprefix.models.packing.loss import next_token_loss
from frozenprefix.models.packing.trie import PackedBatch, ancestor_mask


class RowReading(nn.Module):
    """`packed_loss` and `packed_hidden` for a model that reads images into a language model. A mixin."""

    if TYPE_CHECKING:  # what the model has besides
        language_model: PreTrainedModel
        fusion: Fusion
        _start_token: int | None
        _decoder_and_head: tuple[nn.Module, nn.Module, float | None] | None

        @property
        def placeholders_per_image(self) -> int: ...

    def parts(self) -> tuple[nn.Module, nn.Module, float | None]:
        """Decoder, head and logit cap of the LM, checked at the first call."""
        if self._decoder_and_head is None:
            training = self.training
            self.eval()  # an adapter's dropout would show as a difference between parts and whole
            self._decoder_and_head = decoder_and_head(self.language_model)
            self.train(training)
        return self._decoder_and_head

    def fuse(self, input_ids: Tensor, prefix_index: Tensor, prefix_embeds: Tensor | None) -> Tensor:
        """Word embeddings with what the fusion puts into an image's places: int64[B, T] -> float[B, T, D_lm]."""
        embeddings: Any = self.language_model.get_input_embeddings()
        if self._start_token is None:
            return fuse_prefix(embeddings, input_ids, prefix_index, prefix_embeds)
        return embeddings(input_ids.masked_fill(prefix_index >= 0, self._start_token))

    def packed_loss(self, packed: PackedBatch, prefix_embeds: Tensor | None) -> Tensor:
        """Mean loss over the trained tokens of packed rows: a float32 scalar."""
        if seq2seq.is_seq2seq(self.language_model):
            return seq2seq.packed_loss(self, packed, prefix_embeds) / packed.num_tokens
        _, head, softcap = self.parts()
        # [K, D_lm] -> scalar
        hidden = self.packed_hidden(packed, prefix_embeds)
        edges = (packed.edge_source, packed.edge_label, packed.edge_weight)
        return next_token_loss(hidden, head, *edges, softcap=softcap) / packed.num_tokens

    def packed_hidden(self, packed: PackedBatch, prefix_embeds: Tensor | None) -> Tensor:
        """Last hidden states at the nodes that predict something: float[K, D_lm].

        Rows of one text each are read as a plain batch by an LM that can read no others.

        Raises:
            ConfigError: when several texts share a row that this LM cannot read.
        """
        decoder, _, _ = self.parts()
        # [R, T] -> [R, T, D_lm]
        inputs_embeds = self.fuse(packed.input_ids, packed.prefix_index, prefix_embeds)
        shown = None
        if prefix_embeds is not None:
            image = packed.shown_index.div(self.placeholders_per_image, rounding_mode="floor")
            shown = Shown(prefix_embeds, packed.prefix_index, image)
        refusal = refuse_rows(self.language_model, int(packed.position_ids.max()) + 1)
        layout: dict[str, Any]
        if refusal is None:
            mask = ancestor_mask(packed.subtree_end, inputs_embeds.dtype)
            config = self.language_model.config.get_text_config()
            layout = {"attention_mask": mask_per_kind(config, mask), "position_ids": packed.position_ids}
        elif packed.lengths is None:
            raise ConfigError(f"training.packing: {refusal}")
        else:
            places = torch.arange(packed.input_ids.shape[1], device=packed.lengths.device)
            layout = {"attention_mask": (places < packed.lengths[:, None]).long()}
        attention = attention_for_rows(self.language_model) if refusal is None else nullcontext()
        with self.fusion.showing(shown), attention:
            hidden = decoder(inputs_embeds=inputs_embeds, use_cache=False, **layout).last_hidden_state
        return hidden.flatten(0, 1)[packed.predict_index]


def refuse_rows(language_model: PreTrainedModel, longest: int) -> str | None:
    """Say in one line why this LM cannot read tries of texts of up to `longest` tokens, or None when it can."""
    refusal = check_packable(language_model)
    window = getattr(language_model.config.get_text_config(), "sliding_window", None)
    if refusal is None and window and longest > window:
        return (
            f"a packed text of {longest} tokens is longer than the LM's sliding window ({window}); shorten "
            "max_target_tokens or set training.packing=none"
        )
    return refusal
