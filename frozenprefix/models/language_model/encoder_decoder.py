"""Encoder-decoder language models (T5 and its kin): the encoder reads images and prompt, the decoder writes.

What the encoder reads is closed by the end token, as these models' tokenizers close every text (Raffel et al. 2020),
and padded on the right, so that learned positions are those of the text. Shape letters: B texts, S source length,
L target length, D_lm, V words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from frozenprefix.errors import ConfigError
from frozenprefix.models.fusion import Shown
from frozenprefix.models.packing.trie import PackedBatch

if TYPE_CHECKING:
    from frozenprefix.models.language_model.decoder_only import RowReading
    from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration

IGNORED = -100


@dataclass
class SourcesAndTargets:
    """A packed batch with one target in each row, divided into what is read and what is written.

    Attributes:
        input_ids, attention_mask, prefix_index: int64[B, S], closed by the end token, padded on the right.
        labels: int64[B, L], -100 behind the end; weights: float32[B, L], 0 there.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prefix_index: Tensor
    labels: Tensor
    weights: Tensor


def is_seq2seq(language_model: PreTrainedModel) -> bool:
    return bool(language_model.config.is_encoder_decoder)


@torch.no_grad()
def check_seq2seq(language_model: PreTrainedModel) -> None:
    """Refuse LMs without an end token, and those that do more with ids than to look up their embeddings.

    Raises:
        ConfigError: for such an LM.
    """
    name = type(language_model).__name__
    if not isinstance(language_model.config.eos_token_id, int):
        raise ConfigError(f"model.language_model: the config of {name} names no single eos_token_id; set one")
    ids = torch.arange(3, device=language_model.device)[None]
    encoder: Any = language_model.get_encoder()
    by_ids = encoder(input_ids=ids).last_hidden_state
    embeddings: Any = language_model.get_input_embeddings()
    if not torch.allclose(by_ids, encoder(inputs_embeds=embeddings(ids)).last_hidden_state, rtol=1e-2, atol=1e-2):
        raise ConfigError(
            f"model.language_model: {name} changes its word embeddings on their way into the encoder in "
            "a way that this package does not know; use T5, BART or their kin"
        )


def close_source(input_ids: Tensor, attention_mask: Tensor, end_token: int) -> tuple[Tensor, Tensor]:
    """Move padding to the right, and put the end token behind every text that has none.

    Args:
        input_ids, attention_mask: int64[B, S], padded on either side.

    Returns:
        Ids and mask int64[B, S + 1].
    """
    order = (attention_mask == 0).long().argsort(dim=1, stable=True)
    ids, mask = F.pad(input_ids.gather(1, order), (0, 1)), F.pad(attention_mask.gather(1, order), (0, 1))
    length = mask.sum(dim=1)
    rows = torch.arange(len(ids), device=ids.device)
    is_open = (length == 0) | (ids[rows, (length - 1).clamp(min=0)] != end_token)
    ids[rows[is_open], length[is_open]] = end_token
    mask[rows[is_open], length[is_open]] = 1
    return ids, mask


def divide(packed: PackedBatch, end_token: int) -> SourcesAndTargets:
    """Sources and targets of a batch made with `packing: none`.

    Raises:
        ConfigError: when targets share a row.
    """
    if packed.lengths is None:
        raise ConfigError("training.packing: targets share rows, which no encoder-decoder model can read; set 'none'")
    rows, length = packed.input_ids.shape
    row, place = packed.predict_index.div(length, rounding_mode="floor"), packed.predict_index % length
    first = place.new_full((rows,), length).scatter_reduce(0, row, place, "amin")
    step = place - first[row]
    shape = (rows, int(step.max()) + 1)
    labels, weights = step.new_full(shape, IGNORED), packed.edge_weight.new_zeros(shape)
    at = row[packed.edge_source], step[packed.edge_source]
    labels[at], weights[at] = packed.edge_label, packed.edge_weight
    # the first node that predicts something is the last one that is given
    width = int(first.max()) + 1
    given = torch.arange(width, device=first.device) <= first[:, None]
    ids, mask = close_source(packed.input_ids[:, :width].where(given, 0), given.long(), end_token)
    prefix_index = F.pad(packed.prefix_index[:, :width].where(given, -1), (0, 1), value=-1)
    return SourcesAndTargets(ids, mask, prefix_index, labels, weights)


def packed_loss(model: RowReading, packed: PackedBatch, prefix_embeds: Tensor | None) -> Tensor:
    """Sum over trained tokens of weight times -log p, as a float32 scalar."""
    texts = divide(packed, model.language_model.config.eos_token_id)
    # [B, S] -> [B, S, D_lm]
    inputs_embeds = model.fuse(texts.input_ids, texts.prefix_index, prefix_embeds)
    shown = None
    if prefix_embeds is not None:
        image = texts.prefix_index.cummax(dim=1).values.div(model.placeholders_per_image, rounding_mode="floor")
        shown = Shown(prefix_embeds, texts.prefix_index, image)
    with model.fusion.showing(shown):
        logits = logits_of(model.language_model, inputs_embeds, texts.attention_mask, texts.labels)
    losses = cross_entropy(logits, texts.labels, reduction="none")
    return (losses * texts.weights.flatten()).sum()


def cross_entropy(logits: Tensor, labels: Tensor, *, reduction: str) -> Tensor:
    """Of float[B, L, V] and int64[B, L], in float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction=reduction)


def logits_of(language_model: PreTrainedModel, inputs_embeds: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """float[B, L, V] at the places of `labels`: each sees the source and the labels before it."""
    lm: Any = language_model
    return lm(
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        decoder_input_ids=lm.prepare_decoder_input_ids_from_labels(labels=labels),
        use_cache=False,
    ).logits


def forward(
    model: FrozenPrefixForConditionalGeneration,
    input_ids: Tensor | None,
    prefix_embeds: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Loss and logits float[B, L, V] of a plain batch.

    Args:
        input_ids: int64[B, S], what the encoder reads; attention_mask: 0 on padding.
        labels: int64[B, L], what the decoder writes, closed by the end token; -100 behind it. Not shifted.
    """
    if labels is None or input_ids is None:
        raise ConfigError(
            "labels: got None; an encoder-decoder model reads input_ids and writes labels, or use generate()"
        )
    inputs_embeds, mask, shown = _embed_source(model, input_ids, prefix_embeds, attention_mask)
    with model.fusion.showing(shown):
        logits = logits_of(model.language_model, inputs_embeds, mask, labels)
    return cross_entropy(logits, labels, reduction="mean"), logits


def generate(
    model: Any,
    input_ids: Tensor,
    prefix_embeds: Tensor | None,
    attention_mask: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """By transformers' `generate`; texts come without the decoder's start token, so that all tokens are new ones."""
    inputs_embeds, mask, shown = _embed_source(model, input_ids, prefix_embeds, attention_mask)
    with model.fusion.showing(shown):
        made = model.language_model.generate(None, *args, inputs_embeds=inputs_embeds, attention_mask=mask, **kwargs)
    if isinstance(made, Tensor):
        return made[:, 1:]
    made.sequences = made.sequences[:, 1:]
    return made


def _embed_source(
    model: Any, input_ids: Tensor, prefix_embeds: Tensor | None, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor, Shown | None]:
    given = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    ids, mask = close_source(input_ids, given, model.language_model.config.eos_token_id)
    inputs_embeds, shown = model.embed_shown(ids, prefix_embeds, mask)
    return inputs_embeds, mask, shown
