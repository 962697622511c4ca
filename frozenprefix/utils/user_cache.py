"""The user's cache folder, which holds fetched and converted files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from frozenprefix.errors import AssetError
from frozenprefix.utils.files import atomic_folder


def user_cache() -> Path:
    """`$FROZENPREFIX_HOME`, else `$XDG_CACHE_HOME/frozenprefix`, else `~/.cache/frozenprefix`. May not exist yet.

    Example:
        >>> user_cache().is_absolute()
        True
    """
    if home := os.environ.get("FROZENPREFIX_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "frozenprefix"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`; if it does not exist yet, `build(temporary_folder)` fills it first.

    A folder that exists is complete. Processes that build it at the same time do not disturb each other: the first to
    finish wins. When `build` raises, nothing is kept.

    Raises:
        AssetError: the cache is not writable.

    Example:
        >>> folder = build_once(tmp_path / "unpacked", lambda draft: (draft / "a.txt").touch())
        >>> [file.name for file in folder.iterdir()]
        ['a.txt']
    """
    if folder.is_dir():
        return folder
    if not _is_writable(folder.parent):
        raise AssetError(
            f"cannot write to the cache folder {folder.parent}; set FROZENPREFIX_HOME to a folder that is writable"
        )
    with atomic_folder(folder, replace=False) as draft:
        build(draft)
    return folder


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
