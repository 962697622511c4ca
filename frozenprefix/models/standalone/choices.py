"""What the code of a checkpoint is generated with; `write_code` puts the checkpoint's own parts in these places."""

from __future__ import annotations

from frozenprefix.models.fusion.prefix import PrefixFusion as ChosenFusion
from frozenprefix.models.mappers.mlp import MLPMapper as ChosenMapper
from frozenprefix.models.standalone.timm_encoder import load_encoder

__all__ = ["ChosenFusion", "ChosenMapper", "load_encoder"]
