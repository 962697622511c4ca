"""Packing: several targets of an image in one row, as a token trie, and the loss over such rows."""

from frozenprefix.models.packing.trie import (
    PackedBatch,
    Packing,
    Target,
    Trie,
    ancestor_mask,
    build_trie,
    pack,
    pack_prompts,
)

__all__ = ["PackedBatch", "Packing", "Target", "Trie", "ancestor_mask", "build_trie", "pack", "pack_prompts"]
