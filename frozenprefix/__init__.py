"""Give a frozen language model eyes: image encoder → trainable mapper → prefix embeddings → frozen LM."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from frozenprefix.registry import allow_code, lazy_exports
from frozenprefix.version import __version__

if TYPE_CHECKING:
    from frozenprefix.config.loading import load_recipe, recipe_from_dict
    from frozenprefix.config.recipe import Recipe
    from frozenprefix.data.samples import Sample
    from frozenprefix.data.sources import register_source
    from frozenprefix.data.sources.objects import source_from
    from frozenprefix.inference import Captioner
    from frozenprefix.models.configuration import FrozenPrefixConfig, MapperConfig
    from frozenprefix.models.fusion import fuse, register_fusion
    from frozenprefix.models.language_model import FrozenLM
    from frozenprefix.models.mappers import build_mapper, register_mapper
    from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
    from frozenprefix.models.packing import Target, pack
    from frozenprefix.models.processing import FrozenPrefixProcessor
    from frozenprefix.models.vision import register_vision_encoder
    from frozenprefix.training.trainer import train

__all__ = [
    "Captioner",
    "FrozenLM",
    "FrozenPrefixConfig",
    "FrozenPrefixForConditionalGeneration",
    "FrozenPrefixProcessor",
    "MapperConfig",
    "Recipe",
    "Sample",
    "Target",
    "__version__",
    "allow_code",
    "build_mapper",
    "fuse",
    "load_recipe",
    "pack",
    "recipe_from_dict",
    "register_fusion",
    "register_mapper",
    "register_source",
    "register_vision_encoder",
    "source_from",
    "train",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "config.loading": ("load_recipe", "recipe_from_dict"),
        "config.recipe": ("Recipe",),
        "data.samples": ("Sample",),
        "data.sources": ("register_source",),
        "data.sources.objects": ("source_from",),
        "inference": ("Captioner",),
        "models.configuration": ("FrozenPrefixConfig", "MapperConfig"),
        "models.fusion": ("fuse", "register_fusion"),
        "models.language_model": ("FrozenLM",),
        "models.mappers": ("build_mapper", "register_mapper"),
        "models.modeling": ("FrozenPrefixForConditionalGeneration",),
        "models.packing": ("Target", "pack"),
        "models.processing": ("FrozenPrefixProcessor",),
        "models.vision": ("register_vision_encoder",),
        "training.trainer": ("train",),
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# The models register with transformers' Auto classes, which imports torch and takes seconds. The `frozenprefix` command
# names its classes itself and must print its help at once.
if Path(sys.argv[0]).stem != "frozenprefix":
    from frozenprefix.models import auto as _auto  # noqa: F401
