"""What differs between the supported releases of transformers, in one place."""

from __future__ import annotations

import inspect

from transformers import GenerationMixin

CACHE = (
    "cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)  # fmt: skip
"""Name of the key-value cache in arguments and outputs of a language model: `past_key_values` before 5.24."""
