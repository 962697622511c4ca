"""What packages of every kind share: a folder of the user's own, the pinned hash, unpacking once and safely."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from frozenprefix.errors import AssetError
from frozenprefix.utils.hashing import hash_file
from frozenprefix.utils.user_cache import build_once


def is_safe(member: str) -> bool:
    """Whether a path inside an archive stays there, on every operating system."""
    return not (member.startswith("/") or "\\" in member or ":" in member or ".." in PurePosixPath(member).parts)


def own_folder(variable: str, kind: str) -> Path | None:
    """The folder of packages that the user has named in the environment variable, if any."""
    setting = os.environ.get(variable)
    if not setting:
        return None
    folder = Path(setting).expanduser()
    if not folder.is_dir():
        raise AssetError(f"{variable} must name a folder of {kind}s, got '{setting}', which is not a folder")
    return folder


def unpack_once(
    folder: Path,
    what: str,
    sha256: str,
    find: Callable[[Path], Sequence[Path]],
    unpack: Callable[[Path, Path], None],
) -> Path:
    """Return `folder`, which holds everything that is in the package; the first time it is found and unpacked.

    Args:
        what: what the errors call the package.
        find: gives the files of this name and version, those that it fetches in the folder that it is given.
        unpack: from a file into a folder.

    Raises:
        AssetError: when no file has the pinned hash.
    """

    def fetch_and_unpack(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as downloads:
            found = {hash_file(path): path for path in find(Path(downloads))}
            if sha256 not in found:
                got = ", ".join(f"{digest} ({path.name})" for digest, path in found.items())
                raise AssetError(
                    f"the {what} has another SHA-256 than its pin: expected {sha256}, got {got}; it was not unpacked. "
                    "Correct the pin only if you trust this file"
                )
            unpack(found[sha256], target)

    return build_once(folder, fetch_and_unpack)
