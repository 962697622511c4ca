"""The model, its config and its processor, with their parts: encoders, mappers, fusions, language models, adapters."""

from typing import TYPE_CHECKING

from frozenprefix.registry import lazy_exports

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
__getattr__ = lazy_exports(
    __name__,
    {
        "configuration": ("FrozenPrefixConfig", "LanguageModelConfig", "MapperConfig"),
        "encoder_configuration": ("TimmEncoderConfig",),
        "freezing": ("count_parameters", "evaluating", "freeze"),
        "modeling": ("FrozenPrefixForConditionalGeneration",),
        "processing": ("IMAGE_TOKEN", "FrozenPrefixProcessor"),
    },
)
