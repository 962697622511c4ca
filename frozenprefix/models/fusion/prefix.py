"""Prefix embeddings in place of words: Frozen (Tsimpoukelli et al. 2021), ClipCap (Mokady et al. 2021)."""

from __future__ import annotations

from frozenprefix.models.fusion.base import Fusion


class PrefixFusion(Fusion):
    """The mapper's output replaces the placeholders, and nothing else changes.

    Example:
        >>> list(PrefixFusion(lm_dim=8, num_layers=2).parameters())
        []
    """

    def __init__(self, *, lm_dim: int, num_layers: int):
        super().__init__()
