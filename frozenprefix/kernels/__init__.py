"""Fast CPU paths with the plain path beside each; the only package that may use private names of libraries."""

from frozenprefix.kernels.allocator import keep_freed_memory
from frozenprefix.kernels.attention import (
    additive_mask,
    attention_for_rows,
    mask_per_kind,
    matmul_attention,
    recording_attention,
)
from frozenprefix.kernels.compat import CACHE, attention_implementation, is_recurrent
from frozenprefix.kernels.linear import head_tiles, prepackable_dtypes
from frozenprefix.kernels.prepack import (
    prepackable_layers,
    prepacked_bytes,
    prepacked_frozen_weights,
    prepacked_to_generate,
)

__all__ = [
    "CACHE",
    "additive_mask",
    "attention_for_rows",
    "attention_implementation",
    "head_tiles",
    "is_recurrent",
    "keep_freed_memory",
    "mask_per_kind",
    "matmul_attention",
    "prepackable_dtypes",
    "prepackable_layers",
    "prepacked_bytes",
    "prepacked_frozen_weights",
    "prepacked_to_generate",
    "recording_attention",
]
