"""Output files that a user names, which never replace a file from elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from os import PathLike
from pathlib import Path
from typing import Any

from frozenprefix.errors import DataError


def check_output(
    path: str | PathLike[str], own: Collection[str], *, exact: bool = False, force: bool = False, option: str = "--out"
) -> None:
    """Refuse to replace a file unless it was written by the same command before.

    Args:
        own: keys of the JSON object that the command writes; of every row for JSON lines. An existing file with these
            keys, and an empty one, may be replaced.
        exact: the command writes no other keys.
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
    if not os.access(path if path.exists() else above, os.W_OK):
        raise DataError(f"{option}: '{path}' cannot be written; check the permissions of '{above}'")
    if force or not path.is_file() or not path.stat().st_size:
        return
    if not _is_own(path, own, exact):
        raise DataError(
            f"{option}: '{path}' exists and was not written by this command; choose another file, or give --force to "
            "replace it"
        )


def check_run_folder(folder: Path) -> None:
    """Check that a run can write to its output folder, and replaces nothing there that no run has written.

    Raises:
        DataError: naming what is in the way.

    Example:
        >>> (tmp_path / "best").mkdir()
        >>> _ = (tmp_path / "best" / "photo.jpg").write_bytes(b"")
        >>> check_run_folder(tmp_path)
        Traceback (most recent call last):
        frozenprefix.errors.DataError: output_dir: '...best' exists and is no checkpoint; choose another output_dir
    """
    check_output(folder / "log.jsonl", {"step"}, option="output_dir")
    check_output(folder / "bad_images.jsonl", {"image", "reason", "message"}, option="output_dir")
    for name in ("best", "last"):
        place = folder / name
        if place.is_file() or (place.is_dir() and any(place.iterdir()) and not (place / "config.json").is_file()):
            raise DataError(f"output_dir: '{place}' exists and is no checkpoint; choose another output_dir")


def _is_own(path: Path, own: Collection[str], exact: bool) -> bool:
    """Whether a file is one JSON object with these keys, or lines of such objects.

    A killed command may have left the last line unfinished.
    """

    def fits(row: Any) -> bool:
        return isinstance(row, dict) and (set(own) == row.keys() if exact else set(own) <= row.keys())

    try:
        with path.open("rb") as file:
            first = file.readline().removeprefix(b"\xef\xbb\xbf")
            if first.strip() in (b"{", b"["):
                return fits(json.loads(first + file.read()))
            if not fits(json.loads(first)):
                return False
            for line in file:
                try:
                    if line.strip() and not fits(json.loads(line)):
                        return False
                except ValueError:
                    return not line.endswith(b"\n")
            return True
    except (OSError, ValueError):
        return False
