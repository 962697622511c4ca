"""What differs between the supported releases of torch and transformers, in one place."""

from __future__ import annotations

import inspect
import logging

import torch
from transformers import GenerationMixin

logger = logging.getLogger(__name__)

CACHE = (
    "cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)  # fmt: skip
"""Name of the key-value cache in arguments and outputs of a language model: `past_key_values` before 5.24."""

_global_hooks_set = getattr(torch.nn.modules.module, "_has_any_global_hook", None)
if _global_hooks_set is None:
    logger.info("this torch does not say whether modules have global hooks; fused layers are not used")


def has_global_hooks() -> bool:
    """Whether hooks on all modules are set; taken to be so where torch does not say, which is slower and right."""
    return True if _global_hooks_set is None else _global_hooks_set()
