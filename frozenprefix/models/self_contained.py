"""Frozen parts inside a checkpoint, so that its folder needs nothing else."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

from frozenprefix.errors import ConfigError
from frozenprefix.models.configuration import LanguageModelConfig
from frozenprefix.models.language_model.loading import language_model_identity, load_language_model
from frozenprefix.models.standalone import CODE_FILE, forget_code, write_code
from frozenprefix.models.vision.build import read_identity, save_vision_encoder

LM_FOLDER = "language_model"
ENCODER_FOLDER = "vision_encoder"
# fields of the encoder's section that name a copy in the checkpoint
_PLACES = ("weights", "name")


def write_frozen_parts(model: Any, config: Any, folder: Path, *, code: bool) -> None:
    """Write the encoder, the language model and, with `code`, what loads them without this package.

    Args:
        config: the checkpoint's config, which afterwards names the copies; their origins are kept as `origin`.

    Raises:
        ConfigError: for parts that cannot be written, and for parts that the code does not support.

    Example:
        >>> import copy
        >>> config = copy.deepcopy(model.config)
        >>> write_frozen_parts(model, config, tmp_path, code=True)
        >>> sorted(path.name for path in tmp_path.iterdir())
        ['language_model', 'modeling_frozenprefix.py', 'vision_encoder']
    """
    if "language_model" not in model.part_names:
        raise ConfigError(f"self_contained: a {type(model).__name__} cannot be written with its frozen parts")
    if code:
        write_code(model, config, folder)  # first, as it refuses what it does not support
    else:
        (folder / CODE_FILE).unlink(missing_ok=True)
    config.origin = {**getattr(config, "origin", {}), **_sources(config)}
    config.vision_encoder = save_vision_encoder(config.vision_encoder, folder / ENCODER_FOLDER)
    _save_language_model(model, config, folder / LM_FOLDER)
    config.identity = {**config.identity, "vision_encoder": read_identity(config.vision_encoder)}


def _sources(config: Any) -> dict[str, dict[str, str]]:
    """Identities of parts that are not copies yet."""
    known = getattr(config, "origin", {})
    return {part: entries for part, entries in config.identity.items() if part not in known}


def _save_language_model(model: Any, config: Any, target: Path) -> None:
    """Write the language model as it is, and let the checkpoint's config name that copy.

    With an adapter of peft inside, whose layers have names of their own, the model is read again and written.
    """
    section = config.language_model
    language_model = model.language_model
    if "language_model" in model.adapters:
        if section is None:
            raise ConfigError("self_contained: the language model has an adapter and was not loaded by path; unload it")
        language_model = load_language_model(section)[0]
    language_model.save_pretrained(target)
    dtype = str(language_model.dtype).removeprefix("torch.")
    values: dict[str, Any] = {"path": str(target.resolve()), "dtype": dtype, "revision": None}
    config.language_model = LanguageModelConfig(**values) if section is None else section.model_copy(update=values)
    config.identity = {**config.identity, "language_model": language_model_identity(language_model, target)}


def make_portable(config: Any, folder: Path) -> None:
    """Name local parts by their paths from the checkpoint, so that both can move together.

    The absolute path of a language model is kept too, for a checkpoint that is copied without it.
    """
    section = getattr(config, "language_model", None)
    if section is not None and (place := Path(section.path).expanduser()).exists():
        config.language_model_location = str(place.resolve())
        path = os.path.relpath(config.language_model_location, folder.resolve())
        config.language_model = section.model_copy(update={"path": path})
    encoder: Any = getattr(config, "vision_encoder", None)
    for name in _PLACES:
        place = Path(getattr(encoder, name, None) or "")
        if place.is_absolute() and place.is_relative_to(folder):
            config.vision_encoder = encoder.model_copy(update={name: place.relative_to(folder).as_posix()})


def locate(config: Any, source: str | PathLike[Any]) -> None:
    """Undo `make_portable` for a checkpoint in the folder `source`; what its code needs is taken out."""
    forget_code(config)
    encoder: Any = getattr(config, "vision_encoder", None)
    for name in _PLACES:
        value = getattr(encoder, name, None)
        if isinstance(value, str) and PurePosixPath(value).parts[:1] == (ENCODER_FOLDER,):
            place = Path(source).resolve() / value
            config.vision_encoder = encoder.model_copy(update={name: str(place)})
    location = vars(config).pop("language_model_location", None)
    if location is None or config.language_model is None:
        return
    place = Path(source) / config.language_model.path
    path = str(place.resolve()) if place.exists() else location
    config.language_model = config.language_model.model_copy(update={"path": path})
