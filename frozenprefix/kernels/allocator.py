"""Memory that stays with the process between steps of training or batches of an evaluation."""

from __future__ import annotations

import ctypes
import logging
import sys

logger = logging.getLogger(__name__)
# parameters of glibc's mallopt(3)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc to reuse freed memory in place of giving it back to the system; True when it does.

    A step on the CPU takes and frees the same megabytes again and again. By default every large block is mapped anew,
    and the system fills it with zeros, page by page, before the first write. Elsewhere than under glibc nothing is
    done. Memory in use stays what it is; what is free is not seen by other processes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    done = all([mallopt(_TRIM_THRESHOLD, _NEVER), mallopt(_MMAP_THRESHOLD, _NEVER)])
    if not done:
        logger.info("glibc refused to keep freed memory; everything works, more slowly")
    return done
