"""Which texts share a row, when all of them would make it too long."""

from __future__ import annotations

from collections.abc import Sequence

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
