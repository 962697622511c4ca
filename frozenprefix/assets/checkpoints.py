"""Checkpoint folders, checked before anything slow is imported or loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from frozenprefix.errors import CheckpointError, FrozenPrefixError, did_you_mean
from frozenprefix.utils import parse_json

CONFIG = "config.json"
MODEL_TYPES = ("frozenprefix", "locked_image_text")
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def is_hub_id(path: str | os.PathLike[str]) -> bool:
    """Whether a text has the form of a Hub id, NAME or OWNER/NAME, and is not an existing path.

    Example:
        >>> is_hub_id("gpt2"), is_hub_id("../gpt2")
        (True, False)
    """
    return _HUB_ID.fullmatch(str(path)) is not None and not Path(path).exists()


def check_checkpoint(checkpoint: str | os.PathLike[str], *, field: str = "checkpoint") -> None:
    """Check that a checkpoint folder is there and is one of this package; a Hub id is left to the Hub.

    Args:
        field: what names the checkpoint, for messages.

    Raises:
        CheckpointError: naming the nearest folder where the name is mistyped.

    Example:
        >>> check_checkpoint(checkpoint)
        >>> check_checkpoint(tmp_path / "bset")
        Traceback (most recent call last):
        frozenprefix.errors.CheckpointError: checkpoint: got '...bset', expected a checkpoint folder...
    """
    folder = Path(checkpoint).expanduser()
    if not folder.exists():
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        if offline or not is_hub_id(checkpoint) or (folder.parent != Path() and folder.parent.is_dir()):
            raise missing_checkpoint(checkpoint, field=field)
        return
    if not folder.is_dir():
        raise CheckpointError(f"{field}: got the file '{checkpoint}', expected a folder; try '{folder.parent}'")
    if not (folder / CONFIG).is_file():
        inside = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
        name = "best" if "best" in inside else next(iter(inside), None)
        hint = "" if name is None else f" (did you mean '{folder / name}'?)"
        raise CheckpointError(f"{field}: '{checkpoint}' holds no {CONFIG}{hint}")
    try:
        kind = parse_json((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{field}: '{folder / CONFIG}' cannot be read ({error})") from error
    if kind not in MODEL_TYPES:
        known = " or ".join(map(repr, MODEL_TYPES))
        raise CheckpointError(f"{field}: '{checkpoint}' holds a model of type {kind!r}, expected {known}")


@contextmanager
def opening_checkpoint(checkpoint: str | os.PathLike[str]) -> Iterator[None]:
    """Load a checkpoint inside the block: errors of files and of the Hub become one line of `CheckpointError`.

    Example:
        >>> from frozenprefix import FrozenPrefixConfig
        >>> with opening_checkpoint(checkpoint):
        ...     config = FrozenPrefixConfig.from_pretrained(checkpoint)
    """
    check_checkpoint(checkpoint)
    try:
        yield
    except FrozenPrefixError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if not Path(checkpoint).expanduser().is_dir():
            raise missing_checkpoint(checkpoint, str(error)) from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"checkpoint: '{checkpoint}' cannot be loaded ({reason})") from error


def missing_checkpoint(
    checkpoint: str | os.PathLike[str], reason: str = "", *, field: str = "checkpoint"
) -> CheckpointError:
    """The error for a checkpoint that is neither a folder nor on the Hub, with the nearest folder's name."""
    folder = Path(checkpoint).expanduser()
    parent = folder.parent
    while not parent.is_dir():
        folder, parent = parent, parent.parent
    names = sorted(path.name for path in parent.iterdir() if path.is_dir())
    hint = did_you_mean(folder.name, names).replace("'", f"'{parent / ' '}".removesuffix(" "), 1)
    why = f"; {reason.splitlines()[0]}" if reason else ""
    return CheckpointError(f"{field}: got '{checkpoint}', expected a checkpoint folder or a Hub id{hint}{why}")
