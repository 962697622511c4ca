"""Encoder-decoder language models (T5, BART): the encoder reads images and prompt, the decoder writes.

The encoder's input is closed by the end token, as the tokenizers of these models close every text (Raffel et al. 2020),
and padded on the right, so that learned positions start at the text. Shape letters: B texts, S source length,
L target length, D_lm, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from frozenprefix.errors import ConfigError
from frozenprefix.models.language_model.base import BeamOptions, FrozenLM, LMOutput, with_one_config
from frozenprefix.models.packing import PackedBatch

IGNORE_INDEX = -100


@dataclass
class SourcesAndTargets:
    """A packed batch with one target per row, divided into the encoder's inputs and the decoder's targets.

    Attributes:
        input_ids, attention_mask, prefix_index, latest_index: int64[B, S], with the end token, padded on the right.
        labels: int64[B, L], -100 after the end; weights: float32[B, L], 0 there.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prefix_index: Tensor
    latest_index: Tensor
    labels: Tensor
    weights: Tensor


class EncoderDecoderLM(FrozenLM[SourcesAndTargets]):
    """An LM whose encoder reads the input embeddings.

    Raises:
        ConfigError: for an LM without an end token, and one that does more with ids than look up their embeddings.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> config = T5Config(vocab_size=10, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        >>> lm = EncoderDecoderLM(T5ForConditionalGeneration(config).eval())
        >>> lm.end_token, lm.keeps_history
        (1, False)
    """

    keeps_history = False
    is_encoder_decoder = True

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        if not isinstance(model.config.eos_token_id, int):
            raise ConfigError(f"model.language_model: the config of {self.name} names no single eos_token_id; set one")
        self.end_token: int = model.config.eos_token_id
        self._check_embeddings()

    @torch.no_grad()
    def _check_embeddings(self) -> None:
        ids = torch.arange(3, device=self.model.device)[None]
        encoder: Any = self.model.get_encoder()
        by_ids = encoder(input_ids=ids).last_hidden_state
        by_embeddings = encoder(inputs_embeds=self.embed(ids)).last_hidden_state
        if not torch.allclose(by_ids, by_embeddings, rtol=1e-2, atol=1e-2):
            raise ConfigError(
                f"model.language_model: {self.name} changes its word embeddings on their way into the encoder in "
                "a way that this package does not know; use T5, BART or their kin"
            )

    def packing_problem(self, longest: int = 0) -> str | None:
        """Always one: the encoder's attention is not causal, so it would mix the targets of a row."""
        return f"{self.name} has an encoder, which sees a row as a whole: give it one target; set training.packing=none"

    def layout(self, packed: PackedBatch) -> SourcesAndTargets:
        """Divide each row into source and target."""
        return divide(packed, self.end_token)

    def loss(self, rows: SourcesAndTargets, inputs_embeds: Tensor, label_smoothing: float = 0.0) -> Tensor:
        logits = self._logits_at(inputs_embeds, rows.attention_mask, rows.labels)
        losses = cross_entropy(logits, rows.labels, reduction="none", label_smoothing=label_smoothing)
        return (losses * rows.weights.flatten()).sum()

    def _logits_at(self, inputs_embeds: Tensor, attention_mask: Tensor | None, labels: Tensor) -> Tensor:
        """float[B, L, V] at the places of `labels`; each sees the source and the labels before it."""
        lm: Any = self.model
        return lm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            decoder_input_ids=lm.prepare_decoder_input_ids_from_labels(labels=labels),
            use_cache=False,
        ).logits

    def hidden(self, rows: SourcesAndTargets, inputs_embeds: Tensor) -> NoReturn:
        self._refuse()

    def logits(self, hidden: Tensor, dtype: torch.dtype | None = None) -> NoReturn:
        self._refuse()

    def text_states(self, input_ids: Tensor, attention_mask: Tensor) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ConfigError(
            f"model.language_model: {self.name} has an encoder of its own; losses on hidden states and likelihoods of "
            "packed texts need a causal LM"
        )

    def prompt(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Closed by the end token and padded on the right: int64[B, S] -> int64[B, S + 1]."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return close_source(input_ids, mask, self.end_token)

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None, labels: Tensor | None = None, **kwargs: Any
    ) -> LMOutput:
        """As `FrozenLM.forward`; `labels`: int64[B, L], closed by the end token, not shifted. Other arguments: none."""
        if labels is None:
            raise ConfigError(
                "labels: got None; an encoder-decoder model reads input_ids and writes labels, or use generate()"
            )
        logits = self._logits_at(inputs_embeds, attention_mask, labels)
        return LMOutput(logits, cross_entropy(logits, labels, reduction="mean"))

    def generate(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        beams: BeamOptions | None = None,
        **kwargs: Any,
    ) -> Any:
        """By transformers; the decoder's start token is taken off, so that all tokens are new ones."""
        self.check_length(inputs_embeds.shape[1])
        self.check_length(1, kwargs.get("max_new_tokens") or 1, what="max_new_tokens: the start")
        lm: Any = self.model
        kwargs = with_one_config(kwargs)
        output = lm.generate(None, *args, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        if isinstance(output, Tensor):
            return output[:, 1:]
        output.sequences = output.sequences[:, 1:]
        return output


def close_source(input_ids: Tensor, attention_mask: Tensor, end_token: int) -> tuple[Tensor, Tensor]:
    """Move padding to the right, and append the end token to every text that does not end in one.

    Args:
        input_ids, attention_mask: int64[B, S], padded on either side.

    Returns:
        Ids and mask int64[B, S + 1].

    Example:
        >>> ids, mask = close_source(torch.tensor([[0, 5, 6]]), torch.tensor([[0, 1, 1]]), end_token=2)
        >>> ids.tolist(), mask.tolist()
        ([[5, 6, 2, 0]], [[1, 1, 1, 0]])
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
    """Sources and targets of a batch packed with `packing: none`.

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
    labels, weights = step.new_full(shape, IGNORE_INDEX), packed.edge_weight.new_zeros(shape)
    at = row[packed.edge_source], step[packed.edge_source]
    labels[at], weights[at] = packed.edge_label, packed.edge_weight
    # the first node that predicts something is the last token of the source
    width = int(first.max()) + 1
    in_source = torch.arange(width, device=first.device) <= first[:, None]
    ids, mask = close_source(packed.input_ids[:, :width].where(in_source, 0), in_source.long(), end_token)
    prefix_index = F.pad(packed.prefix_index[:, :width].where(in_source, -1), (0, 1), value=-1)
    latest_index = prefix_index.cummax(dim=1).values
    return SourcesAndTargets(ids, mask, prefix_index, latest_index, labels, weights)


def cross_entropy(logits: Tensor, labels: Tensor, *, reduction: str, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of float[B, L, V] and int64[B, L], in float32."""
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": label_smoothing}
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, **options)
