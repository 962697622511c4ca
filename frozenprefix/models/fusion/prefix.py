"""Prefix embeddings in the place of words: Frozen (Tsimpoukelli et al. 2021), ClipCap (Mokady et al. 2021)."""

from __future__ import annotations

from frozenprefix.models.fusion.base import Fusion


class PrefixFusion(Fusion):
    """The mapper's output stands where the placeholders are, and nothing else changes."""

    def __init__(self, *, lm_dim: int, num_layers: int):
        super().__init__()
