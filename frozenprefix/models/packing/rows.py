"""Tries of several images in the rows of one batch: index tensors for the language model and its loss.

Shape letters: R rows, T row length, K predicting nodes, E edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor

from frozenprefix.errors import TrainingError
from frozenprefix.kernels.attention import additive_mask
from frozenprefix.models.packing.division import TOKENS_PER_ROW, divide, fill_rows
from frozenprefix.models.packing.trie import Target, Trie, build_trie

Packing = Literal["trie", "flat", "none"]


@dataclass
class PackedBatch:
    """Rows of tries, and the tokens that each node has to predict.

    Attributes:
        input_ids: int64[R, T], padded with 0.
        position_ids: int64[R, T], the depth of each node.
        subtree_end: int64[R, T], one past the last descendant of each node, as an index into its row.
        prefix_index: int64[R, T], index of each placeholder among those of all images, -1 for text.
        latest_index: int64[R, T], index of the latest placeholder at or before each token in its own text, -1 for none.
        predict_index: int64[K], nodes that predict something, as indices into [R * T].
        edge_source: int64[E], index into the K nodes.
        edge_label: int64[E], the next token.
        edge_weight: float32[E], sum of the weights of the targets that have this edge.
        num_targets: targets in the batch.
        num_tokens: learned tokens in the batch, before any sharing.
        lengths: int64[R], tokens of each row if every row is one text; None if texts share rows.

    Example:
        >>> batch = pack([[Target([300, 5, 6, 2], 1)]], image_token_id=300, prefix_length=1)
        >>> batch.prefix_index.tolist(), batch.edge_label.tolist()
        ([[0, -1, -1]], [5, 6, 2])
    """

    input_ids: Tensor
    position_ids: Tensor
    subtree_end: Tensor
    prefix_index: Tensor
    latest_index: Tensor
    predict_index: Tensor
    edge_source: Tensor
    edge_label: Tensor
    edge_weight: Tensor
    num_targets: int
    num_tokens: int
    lengths: Tensor | None = None

    def draw_words(self, share: float) -> Tensor:
        """Draw a share of the words that are continued, by torch's random state: bool[R, T].

        Example:
            >>> batch = pack([[Target([300, 5, 6, 2], 1)]], image_token_id=300, prefix_length=1)
            >>> batch.draw_words(1.0).tolist()
            [[False, True, True]]
        """
        nodes = self.predict_index
        drawn = torch.zeros_like(self.input_ids, dtype=torch.bool).flatten()
        drawn[nodes] = torch.rand(nodes.shape, device=nodes.device) < share
        return drawn.view_as(self.input_ids) & (self.prefix_index < 0)

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the batch with all tensors on `device`."""
        values: dict[str, Any] = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        for name, value in values.items():
            values[name] = value.to(device) if isinstance(value, Tensor) else value
        return PackedBatch(**values)


def pack(
    images: Sequence[Sequence[Target]],
    *,
    image_token_id: int,
    prefix_length: int,
    images_per_group: Sequence[int] | None = None,
    packing: Packing = "trie",
    tokens_per_row: int | None = None,
    tokens_per_trie: int | None = None,
) -> PackedBatch:
    """Pack the targets of several images into rows.

    Args:
        images: the targets of each image, or of each group of images that are shown together.
        prefix_length: placeholders per image.
        images_per_group: number of images in each group; 1 each by default.
        packing: "trie" shares the prefix and all common leading tokens, "flat" the prefix and the prompt. "none"
            repeats everything for every target: one target per row, the plain batch.
        tokens_per_row: fill rows up to this many tokens; by default the row length with the lowest estimated cost.
        tokens_per_trie: divide the targets of an image among several tries where one would have more tokens.

    Raises:
        TrainingError: if there is nothing to learn, or a target does not hold its images' placeholders.

    Example:
        >>> targets = [Target([300, 5, 6, 2], 1), Target([300, 5, 7, 2], 1)]
        >>> batch = pack([targets, targets[:1]], image_token_id=300, prefix_length=1, tokens_per_row=8)
        >>> batch.input_ids.tolist(), batch.num_tokens
        ([[300, 5, 6, 7, 300, 5, 6]], 9)
    """
    counts = [1] * len(images) if images_per_group is None else list(images_per_group)
    tries: list[Trie] = []
    # The prefix embeddings of all images are one long list later. `start` counts those of the images so far, so that a
    # placeholder's number within its trie becomes an index into that list.
    first_placeholder: list[int] = []  # of each trie
    start = 0
    for targets, shown in zip(images, counts, strict=True):
        for target in targets:
            held = sum(token_id == image_token_id for token_id in target.input_ids)
            if held != shown * prefix_length:
                raise TrainingError(f"a target holds {held} image placeholders, expected {shown * prefix_length}")
        for group in _tries_of(targets, packing, tokens_per_trie):
            tries.append(build_trie(group, image_token_id, share=packing == "trie"))
            first_placeholder.append(start)
        start += shown * prefix_length
    if not tries:
        raise TrainingError("a batch without any target to learn")
    rows = fill_rows([len(trie) for trie in tries], tokens_per_row if packing != "none" else 0)
    batch = _lay_out(tries, first_placeholder, rows)
    if packing == "none":
        batch.lengths = torch.tensor([len(tries[row[0]]) for row in rows])
    batch.num_targets = sum(len(targets) for targets in images)
    batch.num_tokens = sum(len(target.input_ids) - target.num_context for targets in images for target in targets)
    return batch


def pack_prompts(
    groups: Sequence[Sequence[Sequence[int]]],
    *,
    image_token_id: int,
    prefix_length: int,
    images_per_group: Sequence[int] | None = None,
) -> PackedBatch:
    """Pack prompts that are to be continued: those of a group of images in one row, as a trie.

    Args:
        groups: token ids of the prompts of each group. All prompts of a group show the same images.
        prefix_length, images_per_group: as of `pack`.

    Returns:
        Each prompt has one edge, whose label is its number among all prompts.

    Example:
        >>> batch = pack_prompts([[[300, 5, 6], [300, 5, 7]], [[300, 8]]], image_token_id=300, prefix_length=1)
        >>> batch.input_ids.tolist(), batch.predict_index[batch.edge_source].tolist(), batch.edge_label.tolist()
        ([[300, 5, 6, 7], [300, 8, 0, 0]], [2, 3, 5], [0, 1, 2])
    """
    number = count()
    targets = [[Target([*prompt, next(number)], len(prompt)) for prompt in prompts] for prompts in groups]
    return pack(
        targets,
        image_token_id=image_token_id,
        prefix_length=prefix_length,
        images_per_group=images_per_group,
        tokens_per_row=0,  # one trie each: a row that is longer costs more in every step
        tokens_per_trie=TOKENS_PER_ROW,
    )


def _tries_of(targets: Sequence[Target], packing: Packing, budget: int | None) -> list[list[Target]]:
    """The targets of each trie of an image."""
    if packing == "none":
        return [[target] for target in targets]
    if budget is None:
        return [list(targets)] if targets else []
    numbers = divide([target.input_ids for target in targets], budget)
    return [[targets[number] for number in row] for row in numbers]


def _lay_out(tries: list[Trie], first_placeholder: list[int], rows: list[list[int]]) -> PackedBatch:
    """Write the tries of each row one after the other into padded tensors."""
    # Tries that share a row do not see each other: each one's subtrees end where the next one begins. Positions start
    # at 0 in each of them, because a position is the depth in the trie and not the place in the row.
    width = max(sum(len(tries[i]) for i in row) for row in rows)
    shape = (len(rows), width)
    input_ids, position_ids = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    prefix_index, latest_index = torch.full(shape, -1), torch.full(shape, -1)
    subtree_end = torch.arange(1, width + 1).repeat(len(rows), 1)  # padding sees itself, so that no row of it is empty
    # Only some nodes predict a token that is learned. They are numbered in order of first use, and logits are computed
    # for these K nodes alone: node, as an index into [R * T] -> its number.
    source_of: dict[int, int] = {}
    edge_source, edge_label, edge_weight = [], [], []
    for r, row in enumerate(rows):
        offset = 0
        for i in row:
            trie, start = tries[i], first_placeholder[i]
            span = slice(offset, offset + len(trie))
            prefix, latest = torch.tensor(trie.prefix), torch.tensor(trie.latest)
            input_ids[r, span] = torch.tensor(trie.ids)
            position_ids[r, span] = torch.tensor(trie.depth)
            subtree_end[r, span] = torch.tensor(trie.end) + offset
            prefix_index[r, span] = torch.where(prefix >= 0, prefix + start, -1)
            latest_index[r, span] = torch.where(latest >= 0, latest + start, -1)
            for (node, label), weight in trie.edges.items():
                place = r * width + offset + node
                edge_source.append(source_of.setdefault(place, len(source_of)))
                edge_label.append(label)
                edge_weight.append(weight)
            offset += len(trie)
    return PackedBatch(
        input_ids,
        position_ids,
        subtree_end,
        prefix_index,
        latest_index,
        predict_index=torch.tensor(list(source_of)),
        edge_source=torch.tensor(edge_source),
        edge_label=torch.tensor(edge_label),
        edge_weight=torch.tensor(edge_weight),
        num_targets=0,
        num_tokens=0,
    )


def ancestor_mask(subtree_end: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention mask of packed rows.

    Args:
        subtree_end: int64[R, T].

    Returns:
        float[R, 1, T, T]: 0 where a node may attend (its ancestors and itself), the lowest number elsewhere.

    Example:
        >>> (ancestor_mask(torch.tensor([[3, 2, 3]]), torch.float32)[0, 0] == 0).int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    return additive_mask(visible_nodes(subtree_end), dtype)


def visible_nodes(subtree_end: Tensor) -> Tensor:
    """The nodes that each node sees, its ancestors and itself: int64[R, T] -> bool[R, T, T].

    Example:
        >>> visible_nodes(torch.tensor([[2, 2]])).int().tolist()
        [[[1, 0], [1, 1]]]
    """
    place = torch.arange(subtree_end.shape[1], device=subtree_end.device)
    # query i sees key j when j <= i < end[j]
    return (place[None, :] <= place[:, None]) & (place[:, None] < subtree_end[:, None, :])
