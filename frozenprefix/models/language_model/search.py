"""A search over the prompts of packed rows, by one language model or by several together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers.generation import GenerateBeamDecoderOnlyOutput

from frozenprefix.models.language_model.base import BeamOptions
from frozenprefix.models.language_model.beam_search import BeamSearch
from frozenprefix.models.language_model.sampled_search import SampledSearch
from frozenprefix.models.language_model.trie_reader import Reader
from frozenprefix.models.packing import PackedBatch


class ReadsRows(Protocol):
    """What a search needs of a language model: a `DecoderOnlyLM`."""

    def logits(self, hidden: Tensor) -> Tensor: ...
    def reading_rows(
        self, rows: PackedBatch, inputs_embeds: Tensor, options: BeamOptions
    ) -> AbstractContextManager[Reader]: ...


def search(reader: Reader, logits: Callable[[Tensor], Tensor], options: BeamOptions) -> tuple[Tensor, Tensor]:
    """Continue the reader's prompts; arguments and results as of `BeamSearch`."""
    kind = SampledSearch if options.sampled else BeamSearch
    return kind(reader, logits, options)()


def search_rows(reader: Reader, logits: Callable[[Tensor], Tensor], rows: PackedBatch, options: BeamOptions) -> Any:
    """As `search`, with the texts in the order of the prompts that were packed, as transformers' `generate` returns."""
    sequences, scores = search(reader, logits, options)
    order = rows.edge_label.argsort()
    sequences = sequences.view(len(order), options.num_return_sequences, -1)[order].flatten(0, 1)
    return generated(sequences, scores.view(len(order), -1)[order].flatten(), options)


def generated(sequences: Tensor, scores: Tensor, options: BeamOptions) -> Any:
    """What transformers' `generate` returns."""
    if not options.as_dict:
        return sequences
    return GenerateBeamDecoderOnlyOutput(cast(torch.LongTensor, sequences), cast(torch.FloatTensor, scores))


class JointReader:
    """Readers of the same prompts side by side, one for each of M members.

    What it returns is stacked: float[N, M, D_lm].
    """

    def __init__(self, readers: Sequence[Reader]):
        self.readers = readers

    @property
    def row(self) -> Tensor:
        return self.readers[0].row

    def read_prompts(self) -> Tensor:
        return torch.stack([reader.read_prompts() for reader in self.readers], dim=1)

    def read_words(self, words: Tensor, parents: Tensor) -> Tensor:
        return torch.stack([reader.read_words(words, parents) for reader in self.readers], dim=1)

    def keep(self, prompts: Tensor) -> None:
        for reader in self.readers:
            reader.keep(prompts)


def mean_log_prob(heads: Sequence[Callable[[Tensor], Tensor]], hidden: Tensor) -> Tensor:
    """The mean of the members' log-probabilities: float[N, M, D_lm] -> float32[N, V].

    Example:
        >>> mean_log_prob([torch.nn.Identity()] * 2, torch.zeros(1, 2, 4)).exp().tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """
    members = hidden.unbind(dim=1)
    total = sum(head(member).float().log_softmax(dim=-1) for head, member in zip(heads, members, strict=True))
    return cast(Tensor, total) / len(members)


def continue_together(
    members: Sequence[ReadsRows], rows: PackedBatch, inputs_embeds: Sequence[Tensor], options: BeamOptions
) -> Any:
    """Continue packed prompts by one search of several LMs: the next word is that of the mean of log-probabilities.

    Args:
        inputs_embeds: float[R, T, D_lm] of each member, in the layout `rows`.

    Returns:
        As `FrozenLM.continue_rows`.
    """
    with ExitStack() as stack:
        readers = [
            stack.enter_context(lm.reading_rows(rows, embeds, options))
            for lm, embeds in zip(members, inputs_embeds, strict=True)
        ]
        heads = [lm.logits for lm in members]
        return search_rows(JointReader(readers), lambda hidden: mean_log_prob(heads, hidden), rows, options)
