"""The recipe that a checkpoint folder holds, as far as data are concerned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from frozenprefix.errors import ConfigError


def data_section(checkpoint: str | Path) -> dict[str, Any] | None:
    """The section `data` of a checkpoint folder's recipe.yaml; None where there is no such file.

    Raises:
        ConfigError: for a recipe.yaml that cannot be read.
    """
    file = Path(checkpoint) / "recipe.yaml"
    if not file.is_file():
        return None
    try:
        section = yaml.safe_load(file.read_text(encoding="utf-8"))["data"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: expected a recipe with a `data` section ({error!r})") from error
    if not isinstance(section, dict):
        raise ConfigError(f"{file}: data: got {type(section).__name__}, expected a block of keys")
    return section
