"""Images and texts in one space: contrastive losses and locked-image tuning (Zhai et al. 2022, arXiv 2111.07991)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from frozenprefix.registry import lazy_exports

if TYPE_CHECKING:
    from frozenprefix.models.contrastive.configuration import LockedImageTextConfig, ProjectionConfig, TextTowerConfig
    from frozenprefix.models.contrastive.modeling import LockedImageTextModel, LockedImageTextOutput
    from frozenprefix.models.contrastive.processing import LockedImageTextProcessor, OpenClipProcessor, load_processor

__all__ = [
    "LockedImageTextConfig",
    "LockedImageTextModel",
    "LockedImageTextOutput",
    "LockedImageTextProcessor",
    "OpenClipProcessor",
    "ProjectionConfig",
    "TextTowerConfig",
    "load_processor",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "configuration": ("LockedImageTextConfig", "ProjectionConfig", "TextTowerConfig"),
        "modeling": ("LockedImageTextModel", "LockedImageTextOutput"),
        "processing": ("LockedImageTextProcessor", "OpenClipProcessor", "load_processor"),
    },
)
