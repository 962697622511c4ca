"""Rows of prompts, and the words written after them, as one growing trie in each row.

Several prompts share a row, as the questions about one image do, and several beams continue each of them. The cache of
a row grows by one token for each of its beams in a step, and is never reordered; what changes is who sees whom:

    row of an image      p p p q0 q1      two prompts, "p p p q0" and "p p p q0 q1"
    after two steps      p p p q0 q1  a0 b0  a1 b1
    the second one sees  p p p q0 q1     b0     b1

So a beam is a path in a trie. What it sees (`TrieReader.seen`) says which tokens are on the path, and its position is
the length of its prompt plus the words so far, as it would be in a row of its own.

Shape letters: R rows, T row length, N prompts, k beams, S tokens in the cache, W new tokens in a row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicLayer, PreTrainedModel

from frozenprefix.kernels.attention import additive_mask, attention_for_rows, mask_per_kind
from frozenprefix.kernels.compat import CACHE
from frozenprefix.kernels.llama_reading import layers_to_read, read_tokens
from frozenprefix.models.language_model.base import positions_from_mask
from frozenprefix.models.packing import PackedBatch, visible_nodes

LEAVE_AT = 8  # finished rows leave the batch when they are one in eight: leaving copies the cache of the others


@dataclass
class Prompts:
    """N texts to continue, in R rows.

    Attributes:
        inputs_embeds: float[R, T, D_lm].
        seen: bool[R, T, T], which tokens each token sees.
        positions: int64[R, T].
        row: int64[N], in ascending order; last: int64[N], where in its row a text ends; length: int64[N], its tokens.

    Example:
        >>> prompts = Prompts.from_mask(torch.zeros(2, 3, 8), torch.tensor([[1, 1, 1], [0, 1, 1]]))
        >>> prompts.row.tolist(), prompts.last.tolist(), prompts.length.tolist()
        ([0, 1], [2, 2], [3, 2])
    """

    inputs_embeds: Tensor
    seen: Tensor
    positions: Tensor
    row: Tensor
    last: Tensor
    length: Tensor

    @classmethod
    def from_mask(cls, inputs_embeds: Tensor, attention_mask: Tensor) -> Prompts:
        """One text in each row of float[R, T, D_lm]; int64[R, T], 0 on padding, which is on the left."""
        rows, tokens = attention_mask.shape
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=attention_mask.device).tril()
        # a row of the mask with nothing to see would give NaN: padding sees itself
        itself = torch.eye(tokens, dtype=torch.bool, device=attention_mask.device)
        row = torch.arange(rows, device=attention_mask.device)
        return cls(
            inputs_embeds,
            seen=(causal & attention_mask.bool()[:, None, :]) | itself,
            positions=positions_from_mask(attention_mask),
            row=row,
            last=torch.full_like(row, tokens - 1),
            length=attention_mask.sum(-1),
        )

    @classmethod
    def from_packed(cls, packed: PackedBatch, inputs_embeds: Tensor) -> Prompts:
        """The contexts of all targets in `packed`, in the order of its edges; float[R, T, D_lm]."""
        node = packed.predict_index[packed.edge_source]
        row = node.div(packed.input_ids.shape[1], rounding_mode="floor")
        return cls(
            inputs_embeds,
            seen=visible_nodes(packed.subtree_end),
            positions=packed.position_ids,
            row=row,
            last=node % packed.input_ids.shape[1],
            length=packed.position_ids.flatten()[node] + 1,
        )


class CacheLayer(DynamicLayer):
    """Keys and values of one layer, float[R, heads, room, d], in memory that is allocated once."""

    def __init__(self, room: int):
        super().__init__()
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # transformers' own layer concatenates, which copies the whole cache in every step; here new tokens are written
        # after the others, and attention reads a view of the filled part.
        new = key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.stores = [_room_for(states, self.room) for states in (key_states, value_states)]
            self.filled = 0
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store[:, :, self.filled : self.filled + new] = states
        self.filled += new
        self.keys, self.values = (store[:, :, : self.filled] for store in self.stores)
        return self.keys, self.values

    def keep(self, rows: Tensor) -> None:
        for number, store in enumerate(self.stores):
            self.stores[number] = _room_for(store[: len(rows)], self.room)
            self.stores[number][:, :, : self.filled] = store[rows, :, : self.filled]
        self.keys, self.values = (store[:, :, : self.filled] for store in self.stores)


def _room_for(states: Tensor, room: int) -> Tensor:
    return states.new_empty((*states.shape[:2], room, states.shape[3]))


class Reader(Protocol):
    """What a search reads with: a `TrieReader`, or several side by side.

    Attributes:
        row: int64[N], of the prompts that are left.
    """

    @property
    def row(self) -> Tensor: ...
    def read_prompts(self) -> Tensor: ...
    def read_words(self, words: Tensor, parents: Tensor) -> Tensor: ...
    def keep(self, prompts: Tensor) -> None: ...


class TrieReader:
    """Reads prompts, and then a word of each beam in every step.

    Args:
        decoder: the LM without its head.
        virtual_tokens: tokens that the LM puts into its cache by itself.
        new_tokens: words that a beam may have at most; num_beams: beams of a prompt.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        decoder: nn.Module,
        prompts: Prompts,
        *,
        num_beams: int,
        new_tokens: int,
        virtual_tokens: int = 0,
    ):
        self.language_model, self.decoder = language_model, decoder
        self.config = language_model.config.get_text_config()
        self.row, self.length, self.rows = prompts.row, prompts.length, len(prompts.inputs_embeds)
        self.step = 0
        # bool[N, k, S]: the tokens in the cache that each beam sees
        self.seen = prompts.seen[prompts.row, prompts.last][:, None]
        tokens = prompts.inputs_embeds.shape[1]
        width = int(torch.bincount(prompts.row).max()) * num_beams
        room = virtual_tokens + tokens + width * new_tokens
        self.layers = [CacheLayer(room) for _ in range(self.config.num_hidden_layers)]
        self.cache = Cache(layers=list(self.layers))
        # held here: another thread may take them out of the decoder meanwhile
        self.read_layers = [] if virtual_tokens else layers_to_read(decoder)
        self._prompts = prompts

    def read_prompts(self) -> Tensor:
        """Last hidden state of every prompt: float[N, D_lm]."""
        prompts = self._prompts
        del self._prompts
        return self._forward(prompts.inputs_embeds, prompts.seen, prompts.positions)[prompts.row, prompts.last]

    def read_words(self, words: Tensor, parents: Tensor) -> Tensor:
        """Read one word of each beam.

        Args:
            words: int64[N, k]; parents: int64[N, k], the beam that each of them continues.

        Returns:
            Last hidden states float[N * k, D_lm].
        """
        place, width = self._places(words.shape[1])
        seen = self.seen
        if words.shape[1] > 1:  # one beam goes on from itself
            seen = seen.gather(1, parents[:, :, None].expand(-1, -1, seen.shape[2]))
        written = seen.new_zeros(*words.shape, width).scatter_(2, place[:, :, None], True)
        self.seen = torch.cat([seen, written], dim=2)
        embeds = self.language_model.get_input_embeddings()(words)
        positions = (self.length[:, None] + self.step).expand_as(words)
        self.step += 1
        # one prompt in every row: nothing has to be moved into its place
        if self.rows == len(words) and width == words.shape[1]:
            return self._forward(embeds, self.seen, positions).flatten(0, 1)
        row = self.row[:, None]
        shape = (self.rows, width)
        row_embeds = embeds.new_zeros(*shape, embeds.shape[2])
        row_positions = positions.new_zeros(shape)
        # a place without a word sees itself
        row_seen = seen.new_zeros(*shape, self.seen.shape[2])
        row_seen[:, :, -width:] = torch.eye(width, dtype=torch.bool, device=seen.device)
        row_embeds[row, place], row_positions[row, place], row_seen[row, place] = embeds, positions, self.seen
        return self._forward(row_embeds, row_seen, row_positions)[row, place].flatten(0, 1)

    def keep(self, prompts: Tensor) -> None:
        """Go on with these prompts alone, int64[N'], in ascending order."""
        self.seen, self.length, self.row = self.seen[prompts], self.length[prompts], self.row[prompts]
        rows, row = self.row.unique(return_inverse=True)
        if (self.rows - len(rows)) * LEAVE_AT >= self.rows and len(rows) < self.rows:
            self.row, self.rows = row, len(rows)
            for layer in self.layers:
                layer.keep(rows)

    def _places(self, beams: int) -> tuple[Tensor, int]:
        """The place of each beam among the new tokens of its row, int64[N, k], and their number in a row: W."""
        counts = torch.bincount(self.row, minlength=self.rows)
        first = counts.cumsum(0) - counts
        number = torch.arange(len(self.row), device=self.row.device) - first[self.row]
        return number[:, None] * beams + torch.arange(beams, device=self.row.device), int(counts.max()) * beams

    def _forward(self, inputs_embeds: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        """float[R, W, D_lm], bool[R, W, S], int64[R, W] -> last hidden states float[R, W, D_lm]."""
        mask = additive_mask(seen, inputs_embeds.dtype)
        if self.read_layers:
            return read_tokens(self.decoder, self.read_layers, inputs_embeds, mask, positions, self.cache)
        with attention_for_rows(self.language_model):
            return self.decoder(
                inputs_embeds=inputs_embeds,
                attention_mask=mask_per_kind(self.config, mask),
                position_ids=positions,
                use_cache=True,
                **{CACHE: self.cache},
            ).last_hidden_state
