"""Images and texts in one space: contrastive losses and locked-image tuning (Zhai et al. 2022, arXiv 2111.07991)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

# Imported at first use: recipes need the configuration alone, and the prefix model the losses.
_EXPORTS = {
    "configuration": ("LockedImageTextConfig", "ProjectionConfig", "TextTowerConfig"),
    "modeling": ("LockedImageTextModel", "LockedImageTextOutput"),
    "processing": ("LockedImageTextProcessor", "OpenClipProcessor", "load_processor"),
}


def __getattr__(name: str) -> Any:
    for module, names in _EXPORTS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
