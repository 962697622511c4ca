"""Shared-prefix packing: all targets of an image in one row, as a token trie.

Pure functions from lists of token ids to index tensors. The targets of an image (prompt + answer + end token) are
merged into a trie, so that the image's prefix, and all first words that several targets share, are computed once. Three
captions of one image with a prefix of two placeholders, P:

    P P a man runs <end>                    ┌ runs ─ (<end>)
    P P a man sits <end>    ->    P ─ P ─ a ┼ man ┴ sits ─ (<end>)
    P P a dog <end>                         └ dog ─ (<end>)

The nodes are laid out depth first in one row. An end token is predicted but never read, so it is no node:

    node           0   1   2   3     4      5      6
    token          P   P   a   man   runs   sits   dog
    position       0   1   2   3     4      4      3       its depth in the trie
    subtree_end    7   7   7   6     5      6      7       one behind its last descendant
    predicts       -   a   man runs  <end>  <end>  <end>
                           dog sits

A node may attend to its ancestors and itself. Because of the depth-first order, node j is an ancestor of node i (or i
itself) exactly when `j <= i < subtree_end[j]`: "sits" (5) sees "man" (3), as 3 <= 5 < 6, but not "runs" (4), as 5 < 5
is false. So one vector per row describes the whole attention mask.

What has to be predicted are the edges: distinct pairs (node, next token). An edge that several targets have in common
is computed once, with the sum of their weights: (1, a) counts 3, (2, man) counts 2. Loss and gradient equal those of
the targets computed one by one.

Shape letters: R rows, T row length, K predicting nodes, E edges.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import count
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from frozenprefix.errors import TrainingError
from frozenprefix.kernels.attention import additive_mask
from frozenprefix.models.packing.division import TOKENS_PER_ROW, divide

TRIES_PER_ROW = (1, 2, 3, 4, 6, 8)  # divisions that are tried if no row length is given
ATTENTION_LENGTH = 1024  # tokens in a row at which attention costs as much as the rest of a layer; an estimate
Packing = Literal["trie", "flat", "none"]


class Target(NamedTuple):
    """One text to learn.

    Attributes:
        input_ids: token ids, with the image's placeholders in place.
        num_context: number of first tokens that are given and not learned.
        weight: factor of each token's loss; a negative weight makes the tokens less likely.

    Example:
        >>> Target([300, 300, 5, 6, 2], num_context=2).weight
        1.0
    """

    input_ids: Sequence[int]
    num_context: int
    weight: float = 1.0


@dataclass
class PackedBatch:
    """Rows of tries, and what each node has to predict.

    Attributes:
        input_ids: int64[R, T], padded with 0.
        position_ids: int64[R, T], the depth of each node.
        subtree_end: int64[R, T], one behind the last descendant of each node, as an index into its row.
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

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the batch with all tensors on `device`."""
        values: dict[str, Any] = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        for name, value in values.items():
            values[name] = value.to(device) if isinstance(value, Tensor) else value
        return PackedBatch(**values)


@dataclass
class Trie:
    """The targets of one image, depth first. All lists run over the nodes.

    Attributes:
        ids: token id.
        depth: position in the text.
        end: one behind the last descendant.
        prefix: number of the placeholder within this trie, -1 for text.
        latest: number of the latest placeholder at or before the node, -1 for none.
        edges: (node, next token) -> sum of the targets' weights.

    Example:
        >>> trie = build_trie([Target([300, 5, 2], 1)], image_token_id=300)
        >>> trie.ids, trie.prefix, trie.edges
        ([300, 5], [0, -1], {(0, 5): 1.0, (1, 2): 1.0})
    """

    ids: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    prefix: list[int] = field(default_factory=list)
    latest: list[int] = field(default_factory=list)
    edges: dict[tuple[int, int], float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


def build_trie(targets: Sequence[Target], image_token_id: int, *, share: bool = True) -> Trie:
    """Merge targets into a trie.

    Args:
        share: merge all common first tokens. Otherwise only the context that all targets have in common is merged.

    Raises:
        TrainingError: for a target without a token to learn.

    Example:
        >>> trie = build_trie([Target([300, 5, 6, 2], 1), Target([300, 5, 7, 2], 1)], image_token_id=300)
        >>> trie.ids, trie.end
        ([300, 5, 6, 7], [4, 4, 3, 4])
        >>> trie.edges[0, 5]
        2.0
    """
    # Nodes in the order of their creation; node 0 is a root above the first token.
    children: list[dict[int, int]] = [{}]
    token: list[int] = [-1]
    edges: dict[tuple[int, int], float] = {}
    shared_length = 0 if share else _common_context(targets)
    for target in targets:
        if target.num_context >= len(target.input_ids):
            raise TrainingError("a target has no token left to learn; raise max_target_tokens or drop empty targets")
        node, last = 0, len(target.input_ids) - 1
        for place, token_id in enumerate(target.input_ids):
            if place >= target.num_context:
                edges[node, token_id] = edges.get((node, token_id), 0.0) + target.weight
            if place == last:
                break  # it is only predicted
            # A negative key is no token id, so it never matches: the node is this target's own.
            key = token_id if share or place < shared_length else -len(token)
            if key not in children[node]:
                children[node][key] = len(token)
                children.append({})
                token.append(token_id)
            node = children[node][key]
    return _depth_first(children, token, edges, image_token_id)


def _common_context(targets: Sequence[Target]) -> int:
    """Number of first tokens that all targets have in common and none has to learn."""
    shortest = min(target.num_context for target in targets)
    length = 0
    while length < shortest and len({target.input_ids[length] for target in targets}) == 1:
        length += 1
    return length


def _depth_first(
    children: list[dict[int, int]], token: list[int], edges: dict[tuple[int, int], float], image_token_id: int
) -> Trie:
    """Number the nodes of a trie anew, depth first, and note where each subtree ends."""
    trie = Trie()
    place_of: dict[int, int] = {}
    # Entries are (node, depth, placeholders above it). Each node is pushed a second time, negated, below its children
    # on the stack: it is popped again when its subtree is complete.
    stack = [(child, 0, 0) for child in reversed(children[0].values())]
    while stack:
        node, depth, placeholders = stack.pop()
        if node < 0:
            trie.end[place_of[-node]] = len(trie)
            continue
        place_of[node] = len(trie)
        is_image = token[node] == image_token_id
        trie.ids.append(token[node])
        trie.depth.append(depth)
        trie.end.append(0)
        trie.prefix.append(placeholders if is_image else -1)
        placeholders += is_image
        trie.latest.append(placeholders - 1)
        stack.append((-node, 0, 0))
        for child in reversed(children[node].values()):
            stack.append((child, depth + 1, placeholders))
    for (node, label), weight in edges.items():
        if node == 0:
            raise TrainingError("the first token of a text cannot be learned: there is nothing before it")
        trie.edges[place_of[node], label] = weight
    return trie


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
        packing: "trie" shares the prefix and all common first tokens, "flat" the prefix and the prompt. "none"
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
    first_placeholder: list[int] = []  # of each trie, among the placeholders of all images
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
    rows = _fill_rows([len(trie) for trie in tries], tokens_per_row if packing != "none" else 0)
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


def _fill_rows(lengths: list[int], budget: int | None) -> list[list[int]]:
    """Divide tries of these lengths into rows; return the indices of each row's tries.

    Args:
        budget: at most so many tokens in a row (0: one trie each); None for the division with the lowest cost.
    """
    if budget is None:
        divisions = [_balance(lengths, -(-len(lengths) // share)) for share in TRIES_PER_ROW]
        return min(divisions, key=lambda rows: _cost(lengths, rows))
    # First-fit decreasing: the longest trie first, into the first row with room for it.
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row, free in enumerate(room):
            if lengths[index] <= free:
                rows[row].append(index)
                room[row] -= lengths[index]
                break
        else:
            rows.append([index])
            room.append(budget - lengths[index])
    return rows


def _balance(lengths: list[int], count: int) -> list[list[int]]:
    """Divide tries into `count` rows of about the same length: the longest trie left goes to the shortest row."""
    rows: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, row) for row in range(count)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        filled, row = heapq.heappop(heap)
        rows[row].append(index)
        heapq.heappush(heap, (filled + lengths[index], row))
    return rows


def _cost(lengths: list[int], rows: list[list[int]]) -> float:
    """Estimated time, in tokens: padding costs as much as text, and attention grows with the row length."""
    width = max(sum(lengths[i] for i in row) for row in rows)
    return len(rows) * width * (1 + width / ATTENTION_LENGTH)


def _lay_out(tries: list[Trie], first_placeholder: list[int], rows: list[list[int]]) -> PackedBatch:
    """Write the tries of each row one after the other into padded tensors."""
    width = max(sum(len(tries[i]) for i in row) for row in rows)
    shape = (len(rows), width)
    input_ids, position_ids = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    prefix_index, latest_index = torch.full(shape, -1), torch.full(shape, -1)
    subtree_end = torch.arange(1, width + 1).repeat(len(rows), 1)  # padding sees itself, so that no row of it is empty
    source_of: dict[int, int] = {}  # node, as an index into [R * T] -> its number among the K predicting nodes
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
    """Which nodes each node sees, its ancestors and itself: int64[R, T] -> bool[R, T, T]."""
    place = torch.arange(subtree_end.shape[1], device=subtree_end.device)
    # query i sees key j when j <= i < end[j]
    return (place[None, :] <= place[:, None]) & (place[:, None] < subtree_end[:, None, :])
