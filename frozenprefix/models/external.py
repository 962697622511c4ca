"""Parts of a model from outside this package: what a checkpoint notes about them, and the check when it is read.

The notes are for messages only. Nothing is imported by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import packages_distributions, version
from typing import Any

from frozenprefix.errors import CheckpointError
from frozenprefix.registry import is_external, origin_of

#: Section of the config → the key that names its class, and the group of entry points that may have it.
_GROUPS = {
    "vision_encoder": ("source", "frozenprefix.vision_encoders"),
    "mapper": ("type", "frozenprefix.mappers"),
    "fusion": ("type", "frozenprefix.fusions"),
}


def external_parts(config: Any) -> dict[str, dict[str, str]]:
    """Where the parts of a model that this package does not have come from: section → name, class, package, version.

    Example:
        >>> external_parts(model.config)
        {}
    """
    found = {}
    for section, (key, group) in _GROUPS.items():
        name = getattr(getattr(config, section, None), key, None)
        place = origin_of(name, group) if isinstance(name, str) else None
        if isinstance(name, str) and place is not None:
            found[section] = {"name": name, "class": place, **_package_of(place)}
    return found


def check_external_parts(config: Mapping[str, Any]) -> None:
    """Refuse the config of a checkpoint whose parts of the user's own are not registered in this process.

    Args:
        config: plain data, as in config.json.

    Raises:
        CheckpointError: naming the part, its class and its package.

    Example:
        >>> check_external_parts({"external_parts": {"mapper": {"name": "gated", "class": "mine.mappers:Gated"}}})
        Traceback (most recent call last):
        frozenprefix.errors.CheckpointError: checkpoint: its mapper 'gated' (mine.mappers:Gated) is not a part of ...
    """
    parts = config.get("external_parts")
    for section, (_, group) in _GROUPS.items():
        part = parts.get(section) if isinstance(parts, dict) else None
        if not isinstance(part, dict) or is_external(str(part.get("name")), group):
            continue
        package = " ".join(str(part[key]) for key in ("package", "version") if key in part)
        install = f"install {package}" if package else f"install the package that has it as entry point of '{group}'"
        raise CheckpointError(
            f"checkpoint: its {section.replace('_', ' ')} '{part.get('name')}' ({part.get('class')}) is not a part of "
            "frozenprefix, and is not registered in this process; import the module that registers it first, or "
            f"{install}"
        )


def _package_of(place: str) -> dict[str, str]:
    """Name and version of the installed distribution that a class is from; empty for a script or notebook."""
    names = packages_distributions().get(place.partition(":")[0].partition(".")[0])
    return {"package": names[0], "version": version(names[0])} if names else {}
