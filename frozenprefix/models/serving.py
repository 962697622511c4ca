"""`transformers serve` looks a model up by its name in tables that only transformers' own models are in."""

from __future__ import annotations

from typing import Any, TypeVar

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

Model = TypeVar("Model", bound=type[PreTrainedModel])
SERVER_TABLES = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")


def servable(model_class: Model) -> Model:
    """Class decorator: enter a model with images and texts into these tables, by its config's `model_type`.

    Example:
        >>> servable(type(model)).__name__
        'FrozenPrefixForConditionalGeneration'
    """
    config_class: Any = model_class.config_class
    for name in SERVER_TABLES:
        table = getattr(modeling_auto, name, None)
        if table is not None:
            table[config_class.model_type] = model_class.__name__
    return model_class
