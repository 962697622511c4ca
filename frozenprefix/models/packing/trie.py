"""Shared-prefix packing: all targets of an image in one row, as a token trie.

Pure functions from lists of token ids to index tensors. An image's targets (prompt + answer + end token) are merged
into a trie, so that the image's prefix, and every first words that targets share, are computed once:

    a man runs          p p p a ┬ man ┬ runs ┬ eos
    a man sits     ->           │     └ sits ─ eos
    a dog                       └ dog ─ eos

Nodes are laid out depth first; a node sees its ancestors only, and its position is its depth. Node j is an ancestor of
i (or i itself) exactly when `j <= i < subtree_end[j]`, so one vector describes the mask. Loss and gradient equal those
of the targets computed one by one. Shape letters: R rows, T row length, K predicting nodes, E distinct (node, next
token) edges.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from frozenprefix.errors import TrainingError

TRIES_PER_ROW = (1, 2, 3, 4, 6, 8)  # divisions that are tried when no row length is given
ATTENTION_LENGTH = 1024  # tokens in a row at which attention is taken to cost as much as the rest; an estimate
Packing = Literal["trie", "flat", "none"]


class Target(NamedTuple):
    """One text to learn: ids with the image's placeholders in place, the first `num_context` of them only given.

    Its tokens count `weight` times in the loss; a negative weight makes them less likely.
    """

    input_ids: Sequence[int]
    num_context: int
    weight: float = 1.0


@dataclass
class PackedBatch:
    """Rows of tries, and which node has to predict what.

    Attributes:
        input_ids: int64[R, T], padded with 0.
        position_ids: int64[R, T], the depth of each node.
        subtree_end: int64[R, T], one behind the last descendant of each node, within its row.
        prefix_index: int64[R, T], index of each placeholder among those of all images, -1 for text.
        shown_index: int64[R, T], index of the latest placeholder before or at each token in its own text, -1 for none.
        predict_index: int64[K], nodes that predict something, as indices into [R * T].
        edge_source: int64[E], index into the K nodes; edge_label: int64[E], the next token;
        edge_weight: float32[E], the sum of the weights of the targets that take that step.
        num_targets, num_tokens: targets, and trained tokens, before any sharing.
        lengths: int64[R], the tokens of each row where every row is one text; None where texts share rows.
    """

    input_ids: Tensor
    position_ids: Tensor
    subtree_end: Tensor
    prefix_index: Tensor
    shown_index: Tensor
    predict_index: Tensor
    edge_source: Tensor
    edge_label: Tensor
    edge_weight: Tensor
    num_targets: int
    num_tokens: int
    lengths: Tensor | None = None

    def to(self, device: torch.device | str) -> PackedBatch:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            values[name] = value.to(device) if isinstance(value, Tensor) else value
        return PackedBatch(**values)


@dataclass
class _Trie:
    """One image's targets, depth first. Lists run over nodes."""

    ids: list[int]
    depth: list[int]
    end: list[int]
    prefix: list[int]  # number of the placeholder within this trie, or -1
    shown: list[int]  # number of the latest placeholder so far, or -1
    edges: dict[tuple[int, int], float]  # (node, next token) -> sum of weights


def build_trie(targets: Sequence[Target], image_token_id: int, *, share: bool = True) -> _Trie:
    """Merge targets into a trie. With `share=False` only the common start up to the first free token is shared.

    Raises:
        TrainingError: when a target has no token to learn.
    """
    children: list[dict[int, int]] = [{}]  # nodes in creation order; 0 is a root above the first token
    token: list[int] = [-1]
    edges: dict[tuple[int, int], float] = {}
    branch_from = _common_context(targets, image_token_id) if not share else 0
    for target in targets:
        if target.num_context >= len(target.input_ids):
            raise TrainingError("a target has no token left to learn; raise max_target_tokens or drop empty targets")
        node = 0
        for place, token_id in enumerate(target.input_ids):
            if place >= target.num_context:
                edges[node, token_id] = edges.get((node, token_id), 0.0) + target.weight
            if place == len(target.input_ids) - 1:
                break  # the last token is only predicted, it never has to be read
            key = token_id if share or place < branch_from else -len(token)
            if key not in children[node]:
                children[node][key] = len(token)
                children.append({})
                token.append(token_id)
            node = children[node][key]
    return _depth_first(children, token, edges, image_token_id)


def _common_context(targets: Sequence[Target], image_token_id: int) -> int:
    """Length of the start that all targets share and none has to learn."""
    shortest = min(target.num_context for target in targets)
    length = 0
    while length < shortest and len({target.input_ids[length] for target in targets}) == 1:
        length += 1
    return length


def _depth_first(
    children: list[dict[int, int]], token: list[int], edges: dict[tuple[int, int], float], image_token_id: int
) -> _Trie:
    trie = _Trie([], [], [], [], [], {})
    place_of: dict[int, int] = {0: -1}
    # (node, depth, images' placeholders above it); a node is met again, negated, when its subtree is complete
    stack = [(child, 0, 0) for child in reversed(children[0].values())]
    while stack:
        node, depth, seen = stack.pop()
        if node < 0:
            trie.end[place_of[-node]] = len(trie.ids)
            continue
        place_of[node] = len(trie.ids)
        is_image = token[node] == image_token_id
        trie.ids.append(token[node])
        trie.depth.append(depth)
        trie.end.append(0)
        trie.prefix.append(seen if is_image else -1)
        trie.shown.append(seen + is_image - 1)
        stack.append((-node, 0, 0))
        stack += [(child, depth + 1, seen + is_image) for child in reversed(children[node].values())]
    for (node, label), weight in edges.items():
        if node == 0:
            raise TrainingError("the first token of a text cannot be learned: nothing stands before it")
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
) -> PackedBatch:
    """Pack the targets of several images into rows.

    Args:
        images: for each image (or group of images shown together) its targets.
        prefix_length: placeholders per image.
        images_per_group: images shown in each group; 1 each when not given.
        packing: "trie" shares the prefix and all common first tokens, "flat" the prefix and the prompt, "none"
            repeats everything for every target (one target a row, the plain batch).
        tokens_per_row: rows are filled up to this many tokens; when not given, the row length that costs least.

    Raises:
        TrainingError: when nothing is left to learn, or a target lacks its image's placeholders.
    """
    counts = list(images_per_group or [1] * len(images))
    starts = [sum(counts[:i]) * prefix_length for i in range(len(counts))]
    tries: list[tuple[_Trie, int]] = []
    for targets, start, count in zip(images, starts, counts, strict=True):
        for target in targets:
            held = sum(token_id == image_token_id for token_id in target.input_ids)
            if held != count * prefix_length:
                raise TrainingError(f"a target holds {held} image placeholders, expected {count * prefix_length}")
        groups = [[target] for target in targets] if packing == "none" else [list(targets)]
        tries += [(build_trie(group, image_token_id, share=packing == "trie"), start) for group in groups if group]
    if not tries:
        raise TrainingError("a batch without any target to learn")
    rows = _fill_rows([len(trie.ids) for trie, _ in tries], tokens_per_row if packing != "none" else 0)
    batch = _lay_out(tries, rows)
    if packing == "none":
        batch.lengths = torch.tensor([len(tries[row[0]][0].ids) for row in rows])
    batch.num_targets = sum(len(targets) for targets in images)
    batch.num_tokens = sum(len(t.input_ids) - t.num_context for targets in images for t in targets)
    return batch


def _fill_rows(lengths: list[int], budget: int | None) -> list[list[int]]:
    """Which tries share a row of at most `budget` tokens (0: one each). Without a budget the cheapest division."""
    if budget is None:
        divisions = [_balance(lengths, -(-len(lengths) // share)) for share in TRIES_PER_ROW]
        return min(divisions, key=lambda rows: _cost(lengths, rows))
    # first-fit decreasing
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
    """`count` rows that are about equally long: the longest trie left goes to the shortest row."""
    rows: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, row) for row in range(count)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        filled, row = heapq.heappop(heap)
        rows[row].append(index)
        heapq.heappush(heap, (filled + lengths[index], row))
    return rows


def _cost(lengths: list[int], rows: list[list[int]]) -> float:
    """Time of a division, in tokens: padding costs as much as text, and attention grows with the row."""
    width = max(sum(lengths[i] for i in row) for row in rows)
    return len(rows) * width * (1 + width / ATTENTION_LENGTH)


def _lay_out(tries: list[tuple[_Trie, int]], rows: list[list[int]]) -> PackedBatch:
    width = max(sum(len(tries[i][0].ids) for i in row) for row in rows)
    shape = (len(rows), width)
    input_ids, position_ids = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    prefix_index, shown_index = torch.full(shape, -1), torch.full(shape, -1)
    subtree_end = torch.arange(1, width + 1).repeat(len(rows), 1)  # padding sees itself
    source_of: dict[int, int] = {}
    edge_source, edge_label, edge_weight = [], [], []
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            trie, start = tries[i]
            span = slice(at, at + len(trie.ids))
            prefix, shown = torch.tensor(trie.prefix), torch.tensor(trie.shown)
            input_ids[r, span] = torch.tensor(trie.ids)
            position_ids[r, span] = torch.tensor(trie.depth)
            subtree_end[r, span] = torch.tensor(trie.end) + at
            prefix_index[r, span] = torch.where(prefix >= 0, prefix + start, -1)
            shown_index[r, span] = torch.where(shown >= 0, shown + start, -1)
            for (node, label), weight in trie.edges.items():
                place = r * width + at + node
                edge_source.append(source_of.setdefault(place, len(source_of)))
                edge_label.append(label)
                edge_weight.append(weight)
            at += len(trie.ids)
    return PackedBatch(
        input_ids,
        position_ids,
        subtree_end,
        prefix_index,
        shown_index,
        predict_index=torch.tensor(list(source_of)),
        edge_source=torch.tensor(edge_source),
        edge_label=torch.tensor(edge_label),
        edge_weight=torch.tensor(edge_weight),
        num_targets=0,
        num_tokens=0,
    )


def ancestor_mask(subtree_end: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask float[R, 1, T, T]: 0 where a node may look (its ancestors, itself), else the lowest."""
    place = torch.arange(subtree_end.shape[1], device=subtree_end.device)
    # query i sees key j when j <= i < end[j]
    visible = (place[None, :] <= place[:, None]) & (place[:, None] < subtree_end[:, None, :])
    mask = torch.zeros(visible.shape, dtype=dtype, device=subtree_end.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)
