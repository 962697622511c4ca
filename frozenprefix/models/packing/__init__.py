"""Packing: several targets of an image in one row, as a token trie, and the loss over such rows."""

from frozenprefix.models.packing.rows import (
    PackedBatch,
    Packing,
    ancestor_mask,
    pack,
    pack_prompts,
    visible_nodes,
)
from frozenprefix.models.packing.trie import Target, Trie, build_trie

__all__ = [
    "PackedBatch",
    "Packing",
    "Target",
    "Trie",
    "ancestor_mask",
    "build_trie",
    "pack",
    "pack_prompts",
    "visible_nodes",
]
