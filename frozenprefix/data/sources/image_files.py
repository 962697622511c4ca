"""Images that a source has to look for, or to take out of another file first."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from frozenprefix.errors import DataError
from frozenprefix.utils import build_once, file_sha256, user_cache

log = logging.getLogger(__name__)

IMAGE_ENDINGS = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

_ROWS = "rows.jsonl"
_FORMAT = 1


def report_left_out(where: Path, rows: int, reasons: Counter[str]) -> None:
    """Log how many of `rows` are left out because they have no image, by reason. All of them are an error."""
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    left_out = sum(reasons.values())
    if left_out and left_out == rows:
        raise DataError(f"{where}: none of its {rows} rows has an image ({counts}); check where the images are")
    if left_out:
        log.warning("%s: %d of %d rows have no image and are left out: %s", where, left_out, rows, counts)


def unpack_once(
    files: Sequence[Path], rows: Callable[[Path], Iterable[dict[str, Any]]], *, what: str = ""
) -> tuple[Path, list[dict[str, Any]]]:
    """Take the images out of files into a folder of the user's cache, once for the same bytes.

    Args:
        files: the files that hold the images; rows are taken again when a single byte of them changes.
        rows: called with the folder; writes the images there with `write_image` and yields JSON objects.
        what: anything else that the rows depend on.

    Returns:
        The folder and the rows, which are kept there too.
    """
    state = "\n".join([str(_FORMAT), what, *(file_sha256(file) for file in files)])
    digest = hashlib.sha256(state.encode()).hexdigest()[:16]

    def build(folder: Path) -> None:
        log.info("unpacking the images of %s into %s", files[0], folder.parent)
        with (folder / _ROWS).open("w", encoding="utf-8") as out:
            for row in rows(folder):
                out.write(json.dumps(row) + "\n")

    folder = build_once(user_cache() / "unpacked" / f"{files[0].stem}-{digest}", build)
    with (folder / _ROWS).open(encoding="utf-8") as lines:
        return folder, [json.loads(line) for line in lines]


def write_image(folder: Path, data: bytes, ending: str = "") -> str:
    """Write an image file named by its SHA-256, so that one met again is not written again; return its name."""
    name = hashlib.sha256(data).hexdigest() + ending
    if not (folder / name).exists():
        (folder / name).write_bytes(data)
    return name


def image_ending(name: str) -> str:
    """The ending of an image's name, in small letters; "" when it is none of an image."""
    ending = Path(name).suffix.lower()
    return ending if ending in IMAGE_ENDINGS else ""
