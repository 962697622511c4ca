"""The model, its config and its processor, with their parts: encoders, mappers, fusions, language models, adapters."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frozenprefix.models.configuration import FrozenPrefixConfig, LanguageModelConfig, MapperConfig
    from frozenprefix.models.encoder_configuration import TimmEncoderConfig
    from frozenprefix.models.freezing import count_parameters, evaluating, freeze
    from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
    from frozenprefix.models.processing import IMAGE_TOKEN, FrozenPrefixProcessor

__all__ = [
    "IMAGE_TOKEN",
    "FrozenPrefixConfig",
    "FrozenPrefixForConditionalGeneration",
    "FrozenPrefixProcessor",
    "LanguageModelConfig",
    "MapperConfig",
    "TimmEncoderConfig",
    "count_parameters",
    "evaluating",
    "freeze",
]
_MODULES = {
    "configuration": ("FrozenPrefixConfig", "LanguageModelConfig", "MapperConfig"),
    "encoder_configuration": ("TimmEncoderConfig",),
    "freezing": ("count_parameters", "evaluating", "freeze"),
    "modeling": ("FrozenPrefixForConditionalGeneration",),
    "processing": ("IMAGE_TOKEN", "FrozenPrefixProcessor"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the processor alone needs no language model."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
