"""Keep freed memory in the process between the steps of a training or the batches of an evaluation."""

from __future__ import annotations

import ctypes
import logging
import sys

logger = logging.getLogger(__name__)
# parameters of glibc's mallopt(3)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc to reuse freed memory instead of returning it to the system; return whether it does.

    A step on the CPU allocates and frees the same megabytes again and again. By default every large block is mapped
    again, and the system fills it with zeros, page by page, before the first write. Without glibc nothing is done. The
    memory in use stays the same, but what is free cannot be used by other processes.

    Example:
        >>> isinstance(keep_freed_memory(), bool)
        True
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    accepted = all([mallopt(_TRIM_THRESHOLD, _NEVER), mallopt(_MMAP_THRESHOLD, _NEVER)])
    if not accepted:
        logger.info("glibc refused to keep freed memory; steps take longer")
    return accepted
