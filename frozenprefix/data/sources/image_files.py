"""Images that a source takes out of another file, such as a tar or a table, before they are read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from frozenprefix.utils import (
    build_once,
    content_hash,
    file_sha256,
    read_jsonl,
    safe_file_name,
    user_cache,
    write_jsonl,
)

log = logging.getLogger(__name__)

_ROWS = "rows.jsonl"
_FORMAT = 1


def unpack_once(
    files: Sequence[Path], rows: Callable[[Path], Iterable[dict[str, Any]]], *, what: str = ""
) -> tuple[Path, list[dict[str, Any]]]:
    """Take the images out of files into a folder of the user's cache, once for the same bytes.

    Args:
        files: the files that hold the images; they are unpacked again when a byte of them changes.
        rows: called with the folder; writes the images there with `write_image` and yields JSON objects.
        what: anything else that the rows depend on.

    Returns:
        The folder and the rows, which are kept there too.
    """
    state = "\n".join([str(_FORMAT), what, *(file_sha256(file) for file in files)])

    def build(folder: Path) -> None:
        log.info("unpacking the images of %s into %s", files[0], folder.parent)
        write_jsonl(folder / _ROWS, rows(folder))

    name = f"{safe_file_name(files[0].stem)}-{content_hash(state)[:16]}"
    folder = build_once(user_cache() / "unpacked" / name, build)
    return folder, [row for _, row in read_jsonl(folder / _ROWS)]


def write_image(folder: Path, data: bytes, ending: str = "") -> str:
    """Write an image file that is named by its SHA-256, once for the same bytes; return its name.

    Example:
        >>> write_image(tmp_path, b"image", ".png")[:8]
        '6105d6cc'
    """
    name = content_hash(data) + ending
    if not (folder / name).exists():
        (folder / name).write_bytes(data)
    return name
