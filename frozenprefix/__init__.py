"""Give a frozen language model eyes: image encoder → trainable mapper → prefix embeddings → frozen LM."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frozenprefix.registry import allow_code
from frozenprefix.version import __version__

if TYPE_CHECKING:
    from frozenprefix.config.recipe import Recipe
    from frozenprefix.inference import Captioner
    from frozenprefix.models.configuration import FrozenPrefixConfig
    from frozenprefix.models.mappers import build_mapper
    from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
    from frozenprefix.models.processing import FrozenPrefixProcessor
    from frozenprefix.training.trainer import train

__all__ = [
    "Captioner",
    "FrozenPrefixConfig",
    "FrozenPrefixForConditionalGeneration",
    "FrozenPrefixProcessor",
    "Recipe",
    "__version__",
    "allow_code",
    "build_mapper",
    "train",
]

# Imported when first used: Recipe loads pydantic, train loads accelerate.
_EXPORTS = {
    "Captioner": "frozenprefix.inference",
    "FrozenPrefixConfig": "frozenprefix.models.configuration",
    "FrozenPrefixForConditionalGeneration": "frozenprefix.models.modeling",
    "FrozenPrefixProcessor": "frozenprefix.models.processing",
    "Recipe": "frozenprefix.config.recipe",
    "build_mapper": "frozenprefix.models.mappers",
    "train": "frozenprefix.training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'frozenprefix' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(_EXPORTS[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# The models register with transformers' Auto classes, which imports torch and takes seconds. The `frozenprefix` command
# names its classes itself and must print its help at once.
if Path(sys.argv[0]).stem != "frozenprefix":
    from frozenprefix.models import auto as _auto  # noqa: F401
