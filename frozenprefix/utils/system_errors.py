"""Errors of the operating system, however a library reports them."""

from __future__ import annotations

import re

# of Python, of torch's allocator for the CPU on the systems that refuse memory, of CUDA, and of oneDNN
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "could not allocate")
# libraries in Rust (safetensors, tokenizers) put the number into their text
_NUMBER = re.compile(r"\(os error (\d+)\)|\bOs \{ code: (\d+)")


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory has run out.

    Example:
        >>> is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")), is_out_of_memory(KeyError(1))
        (True, False)
    """
    return isinstance(error, MemoryError) or any(message in str(error).lower() for message in _OUT_OF_MEMORY)


def system_error(error: Exception) -> int | None:
    """Number of the system's error behind an exception (`errno`), or None if it is none of the system's.

    Example:
        >>> system_error(RuntimeError("No space left on device (os error 28)"))
        28
    """
    if isinstance(error, OSError):
        return error.errno
    found = _NUMBER.search(str(error))
    return None if found is None else int(found[1] or found[2])
