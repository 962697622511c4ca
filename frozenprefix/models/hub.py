"""Checkpoints on the Hub: fetched as a folder, and what they name is fetched only where its content is pinned."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from transformers.utils import CONFIG_NAME

from frozenprefix.assets import is_hub_id, is_pypi
from frozenprefix.errors import CheckpointError
from frozenprefix.models.vision.weights import is_weights_file

logger = logging.getLogger(__name__)

PARTS = ("vision_encoder", "language_model", "text_tower")
# what a checkpoint consists of; nothing else in a repository is fetched
_FILES = ("*.json", "*.jinja", "*.safetensors", "*.txt", "*.model", "*.yaml", "*.jsonl")
_FOLDERS = ("language_adapter", "vision_adapter", "language_model", "vision_encoder")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def local_checkpoint(source: str | PathLike[Any], *, subfolder: str | None = None, **hub: Any) -> Path:
    """The folder of a checkpoint: itself, or a copy of what the Hub has under that id.

    Args:
        hub: revision, token, cache_dir, local_files_only, force_download.

    Raises:
        CheckpointError: in one line, where the Hub does not give it.

    Example:
        >>> local_checkpoint(checkpoint) == checkpoint
        True
    """
    folder, inside = Path(source), "" if not subfolder else f"{subfolder}/"
    if not folder.is_dir():
        if not is_hub_id(source):
            raise CheckpointError(f"checkpoint: got '{source}', expected a checkpoint folder or a Hub id")
        patterns = [*_FILES, *(f"{name}/{file}" for name in _FOLDERS for file in _FILES)]
        if try_to_load_from_cache(str(source), inside + CONFIG_NAME, cache_dir=hub.get("cache_dir")) is None:
            logger.warning("fetching the checkpoint '%s' from the Hub", source)
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=[inside + one for one in patterns], **hub))
        except Exception as error:  # the Hub's errors are of many classes
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise CheckpointError(
                f"checkpoint: '{source}' cannot be fetched from the Hub ({reason}); check its name, or give a folder"
            ) from error
    return folder / inside if inside else folder


def pin_parts(config: Any, source: str | PathLike[Any], given: Collection[str]) -> None:
    """Let a checkpoint's config name the very commits of the Hub that it was trained with, and say what is fetched.

    Args:
        config: of the checkpoint; sections without a revision get that of the part's identity.
        given: names of parts that are not loaded.

    Raises:
        CheckpointError: for a part that would come from the Hub without a revision or SHA-256 that its content is
            compared with.

    Example:
        >>> pin_parts(model.config, "checkpoint", given=())
    """
    identity = config.identity if isinstance(config.identity, dict) else {}
    for part in PARTS:
        section = getattr(config, part, None)
        if part in given or section is None:
            continue
        known = identity.get(part) or {}
        for number, fields, place in _from_hub(section):
            prefix = "" if number is None else f"{number}."  # of one of several fused encoders
            entries = {key.removeprefix(prefix): value for key, value in known.items() if key.startswith(prefix)}
            commit = str(entries.get("revision", ""))
            if not _COMMIT.fullmatch(commit) and not entries.get("sha256"):
                raise CheckpointError(
                    f"{source}: {part}: '{place}' would be fetched from the Hub, but config.json pins neither its "
                    f"revision nor a SHA-256, so anything could come; give the part itself as {part}="
                )
            if _COMMIT.fullmatch(commit) and hasattr(fields, "revision"):
                fields.revision = commit
            _say(part, place, commit)


def _from_hub(section: Any) -> Iterator[tuple[int | None, Any, str]]:
    """The sections whose weights come from the Hub: number among fused encoders, fields, what they name there."""
    fused: list[tuple[int | None, Any]] = list(enumerate(getattr(section, "encoders", None) or ()))
    for number, fields in fused or [(None, section)]:
        kind = getattr(fields, "source", "transformers")
        place = str(getattr(fields, "path", None) or fields.name)
        weights = getattr(fields, "weights", None)
        if kind == "transformers":
            if is_hub_id(place) and not is_pypi(place) and not place.endswith(".gguf"):
                yield number, fields, place
        elif kind in ("timm", "open_clip") and weights not in (None, "random") and not is_weights_file(weights):
            yield number, fields, f"{place}, {weights}"


def _say(part: str, place: str, commit: str) -> None:
    """Log what is going to be fetched, if it is not in the cache."""
    at_hand = _COMMIT.fullmatch(commit) and isinstance(try_to_load_from_cache(place, CONFIG_NAME, revision=commit), str)
    if not at_hand:
        logger.warning("%s: '%s' comes from the Hub%s", part, place, f" at revision {commit}" if commit else "")
