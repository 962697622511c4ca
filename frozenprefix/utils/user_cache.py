"""The folder of the user's that fetched and converted files are kept in."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from frozenprefix.errors import AssetError


def user_cache() -> Path:
    """`$FROZENPREFIX_HOME`, else `$XDG_CACHE_HOME/frozenprefix`, else `~/.cache/frozenprefix`. May not exist yet."""
    if home := os.environ.get("FROZENPREFIX_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "frozenprefix"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, which `build(temporary_folder)` fills if it is not there yet.

    The folder appears by a rename when it is complete, so one that exists can be trusted. Processes that build it at
    the same time do not disturb each other: the first to finish wins. When `build` raises, nothing is kept.

    Raises:
        AssetError: the cache is not writable.
    """
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise AssetError(
            f"cannot write to the cache folder {folder.parent}: {error}; set FROZENPREFIX_HOME to one that is writable"
        ) from error
    try:
        build(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
