"""Shared-prefix packing: all targets of an image in one row, as a token trie.

Pure functions on lists of token ids; `rows.py` turns the result into tensors. The targets of an image (prompt, answer
and end token) are merged into a trie, so that the image's prefix, and all leading words that several targets share, are
computed once. Three captions of one image with a prefix of two placeholders, P:

    P P a man runs <end>                    ┌ runs ─ (<end>)
    P P a man sits <end>    ->    P ─ P ─ a ┼ man ┴ sits ─ (<end>)
    P P a dog <end>                         └ dog ─ (<end>)

The nodes are laid out depth first in one row. An end token is predicted but never read, so it is not a node:

    node           0   1   2   3     4      5      6
    token          P   P   a   man   runs   sits   dog
    position       0   1   2   3     4      4      3       its depth in the trie
    subtree_end    7   7   7   6     5      6      7       one past its last descendant
    predicts       -   a   man runs  <end>  <end>  <end>
                           dog sits

A node may attend to its ancestors and itself. Because of the depth-first order, node j is an ancestor of node i (or i
itself) exactly when `j <= i < subtree_end[j]`: "sits" (5) sees "man" (3), as 3 <= 5 < 6, but not "runs" (4), as 5 < 5
is false. So one vector per row describes the whole attention mask.

What has to be predicted are the edges: distinct pairs (node, next token). An edge that several targets have in common
is computed once, with the sum of their weights: (1, a) counts 3, (2, man) counts 2. Loss and gradient equal those of
the targets computed one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from frozenprefix.errors import TrainingError


class Target(NamedTuple):
    """One text to learn.

    Attributes:
        input_ids: token ids, with the image's placeholders in place.
        num_context: number of leading tokens that are read but not learned.
        weight: factor of each token's loss; a negative weight makes the tokens less likely.

    Example:
        >>> Target([300, 300, 5, 6, 2], num_context=2).weight
        1.0
    """

    input_ids: Sequence[int]
    num_context: int
    weight: float = 1.0


@dataclass
class Trie:
    """The targets of one image, depth first. All lists run over the nodes.

    Attributes:
        ids: token id.
        depth: position in the text.
        end: one past the last descendant.
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
        share: merge all common leading tokens. Otherwise only the context that all targets have in common is merged.

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
    # Walk down from the root with each target. Where another target went the same way before, the node exists already.
    for target in targets:
        if target.num_context >= len(target.input_ids):
            raise TrainingError("a target has no token left to learn; raise max_target_tokens or drop empty targets")
        node, last = 0, len(target.input_ids) - 1
        for place, token_id in enumerate(target.input_ids):
            # `node` has read everything before this token: it is the one that predicts it.
            if place >= target.num_context:
                edges[node, token_id] = edges.get((node, token_id), 0.0) + target.weight
            if place == last:
                break  # it is only predicted
            # No token id is negative, so such a key never matches: the node belongs to this target alone.
            key = token_id if share or place < shared_length else -len(token)
            if key not in children[node]:
                children[node][key] = len(token)
                children.append({})
                token.append(token_id)
            node = children[node][key]
    return _depth_first(children, token, edges, image_token_id)


def _common_context(targets: Sequence[Target]) -> int:
    """Number of leading tokens that all targets have in common and none has to learn."""
    shortest = min(target.num_context for target in targets)
    length = 0
    while length < shortest and len({target.input_ids[length] for target in targets}) == 1:
        length += 1
    return length


def _depth_first(
    children: list[dict[int, int]], token: list[int], edges: dict[tuple[int, int], float], image_token_id: int
) -> Trie:
    """Renumber the nodes of a trie depth first, and record where each subtree ends."""
    # With a stack instead of recursion: a text has more tokens than Python allows nested calls.
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
