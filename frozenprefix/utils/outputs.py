"""Output files that a user names, which never replace a file from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Collection
from os import PathLike
from pathlib import Path
from typing import Any

from frozenprefix.errors import DataError

_LARGEST_JSON = 64 << 20  # bytes; a longer file is read to the end of its first line only


def check_output(
    path: str | PathLike[str], own: Collection[str], *, force: bool = False, option: str = "--out"
) -> None:
    """Refuse to replace a file unless it was written by the same command before.

    Args:
        own: keys of the JSON object that the command writes; of the first row for JSON lines. An existing file with
            these keys, and an empty one, may be replaced.
        force: replace any file.
        option: names the output in messages.

    Raises:
        DataError: for a folder, and for another file without `force`.

    Example:
        >>> from frozenprefix.utils import write_jsonl
        >>> write_jsonl(tmp_path / "captions.jsonl", [{"image": "1.jpg", "captions": ["a dog"]}])
        >>> check_output(tmp_path / "captions.jsonl", {"image", "caption", "score"})
        Traceback (most recent call last):
        frozenprefix.errors.DataError: --out: '...captions.jsonl' exists and was not written by this command; ...
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{option}: got the folder '{path}', expected a file to write to")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise DataError(f"{option}: got '{path}', but '{above}' is a file and no folder")
    if force or not path.is_file() or not path.stat().st_size:
        return
    content = _first_object(path)
    if not isinstance(content, dict) or not set(own) <= content.keys():
        raise DataError(
            f"{option}: '{path}' exists and was not written by this command; choose another file, or give --force to "
            "replace it"
        )


def _first_object(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            line = file.readline(_LARGEST_JSON)
            rest = file.read(_LARGEST_JSON) if line.strip() in (b"{", b"[") else b""
        return json.loads((line + rest).decode("utf-8-sig"))
    except (OSError, ValueError):
        return None
