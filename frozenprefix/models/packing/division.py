"""Which texts share a trie, and which tries share a row."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

TRIES_PER_ROW = (1, 2, 3, 4, 6, 8)  # divisions that are tried if no row length is given
ATTENTION_LENGTH = 1024  # tokens in a row at which attention costs as much as the rest of a layer; an estimate
TOKENS_PER_ROW = 512  # beyond that attention costs more than reading the prefix once more


def divide(texts: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Numbers of texts that share a row: those with the longest common starts, up to `budget` tokens in their trie.

    Args:
        texts: token ids of each text.

    Example:
        >>> divide([[1, 2, 3], [1, 4, 5, 6], [1, 2, 7]], budget=5)
        [[0, 2], [1]]
    """
    rows: list[list[int]] = []
    size, before = 0, list[int]()
    for number in sorted(range(len(texts)), key=lambda i: list(texts[i])):
        text = list(texts[number])
        added = len(text) - _common(before, text)
        if rows and size + added <= budget:
            rows[-1].append(number)
            size += added
        else:
            rows.append([number])
            size = len(text)
        before = text
    return rows


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of first tokens that two texts share."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))


def fill_rows(lengths: list[int], budget: int | None) -> list[list[int]]:
    """Divide tries of these lengths into rows; return the indices of each row's tries.

    Args:
        budget: largest number of tokens in a row (0: one trie each); None for the division with the lowest cost.

    Example:
        >>> fill_rows([4, 3, 2], budget=6)
        [[0, 2], [1]]
    """
    if budget is None:
        # Longer rows need less padding and more attention; which division is best depends on the lengths.
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
