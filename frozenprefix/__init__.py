"""Give a frozen language model eyes: image encoder → trainable mapper → prefix embeddings → frozen LM."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from frozenprefix.registry import allow_code, lazy_exports
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

__getattr__ = lazy_exports(
    __name__,
    {
        "config.recipe": ("Recipe",),
        "inference": ("Captioner",),
        "models.configuration": ("FrozenPrefixConfig",),
        "models.mappers": ("build_mapper",),
        "models.modeling": ("FrozenPrefixForConditionalGeneration",),
        "models.processing": ("FrozenPrefixProcessor",),
        "training.trainer": ("train",),
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# The models register with transformers' Auto classes, which imports torch and takes seconds. The `frozenprefix` command
# names its classes itself and must print its help at once.
if Path(sys.argv[0]).stem != "frozenprefix":
    from frozenprefix.models import auto as _auto  # noqa: F401
