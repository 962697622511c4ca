"""Image files of a data set: finding them, and the record of those that could not be read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from frozenprefix.errors import BadImageError, DataError, FrozenPrefixError
from frozenprefix.utils import report, report_left_out, write_jsonl
from frozenprefix.utils.images import decode_image, image_endings, load_image, read_image, to_image

__all__ = [
    "BadImages",
    "decode_image",
    "find_images",
    "image_ending",
    "is_hidden",
    "load_image",
    "processing",
    "read_image",
    "to_image",
    "walk_files",
]


def walk_files(root: Path, *, passed_over: dict[Path, str] | None = None) -> Iterator[Path]:
    """Yield all files under a folder, sorted, however deep. All code walks folders with this function.

    Links to folders are followed, but not in circles. Hidden names and macOS's `__MACOSX` are passed over.

    Args:
        passed_over: collects the paths that are passed over, and why.

    Example:
        >>> [path.name for path in walk_files(data_folder)][0]
        'captions.jsonl'
    """
    yield from _walk(root, (), {} if passed_over is None else passed_over)


def _walk(folder: Path, above: tuple[Path, ...], passed_over: dict[Path, str]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:
        passed_over[folder] = "link to a folder above it"
        return
    files, folders = [], []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        passed_over[folder] = f"folder that cannot be read ({error.strerror or error})"
        return
    for entry in entries:
        path = folder / entry.name
        if is_hidden(entry.name):
            passed_over[path] = "hidden"
        elif entry.is_dir():
            folders.append(path)
        elif entry.is_file():
            files.append(path)
        else:
            passed_over[path] = "broken link" if entry.is_symlink() else "no file"
    yield from files
    for path in folders:
        yield from _walk(path, (*above, real), passed_over)


def is_hidden(name: str) -> bool:
    """Whether a name, or a folder in it, is one that is passed over: `.DS_Store`, `._1.jpg`, `__MACOSX`.

    Example:
        >>> is_hidden("__MACOSX/1.jpg"), is_hidden("./a/1.jpg")
        (True, False)
    """
    parts = name.split("/")
    return any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in parts)


def find_images(root: Path, endings: Collection[str] | None = None) -> list[Path]:
    """All images under a folder, sorted by path. What is left out is counted in the log.

    Args:
        endings: of the file names, in small letters with the dot; default: everything that Pillow reads.

    Raises:
        DataError: the folder does not exist or has no image.

    Example:
        >>> len(find_images(data_folder))
        12
    """
    if not root.is_dir():
        raise DataError(f"{root}: got no folder, expected a folder of images")
    suffixes = frozenset(image_endings() if endings is None else endings)
    passed_over: dict[Path, str] = {}
    files = list(walk_files(root, passed_over=passed_over))
    images = sorted(path for path in files if path.suffix.lower() in suffixes)
    if not images:
        listed = endings or (".jpg", ".png", ".webp", "…")
        raise DataError(f"{root}: got no image, expected files ending in {', '.join(sorted(listed))}")
    total = len(files) + len(passed_over)
    passed_over |= {path: "no image by its name" for path in files if path.suffix.lower() not in suffixes}
    report_left_out(root, total, Counter(passed_over.values()), what="names", examples=passed_over)
    return images


def image_ending(name: str) -> str:
    """The ending of an image's name, in small letters; "" when it is not one of an image.

    Example:
        >>> image_ending("A.JPG"), image_ending("a.txt")
        ('.jpg', '')
    """
    ending = Path(name).suffix.lower()
    return ending if ending in image_endings() else ""


@contextmanager
def processing(image: PathLike[str] | str | Any) -> Iterator[None]:
    """Inside the block an error of an image processor is one bad image, and not the end of the run.

    Raises:
        BadImageError: with reason `unprocessable`.

    Example:
        >>> with processing("a.jpg"):
        ...     [].pop()
        Traceback (most recent call last):
        frozenprefix.errors.BadImageError: a.jpg: the image processor failed (IndexError: pop from empty list)
    """
    try:
        yield
    except FrozenPrefixError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, OSError, RuntimeError, MemoryError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise BadImageError("unprocessable", f"{image}: the image processor failed ({reason})") from error


class BadImages:
    """Images that could not be used, each counted once, by reason.

    Example:
        >>> bad = BadImages()
        >>> bad.record("a.jpg", BadImageError("missing", "a.jpg: No such file"))
        >>> bad.counts
        {'missing': 1}
    """

    def __init__(self) -> None:
        self._errors: dict[str, BadImageError] = {}
        self._written: Path | None = None

    def record(self, path: str | PathLike[str], error: BadImageError) -> None:
        self._errors[str(path)] = error

    def __len__(self) -> int:
        return len(self._errors)

    def __contains__(self, path: object) -> bool:
        return str(path) in self._errors

    def __iter__(self) -> Iterator[tuple[str, BadImageError]]:
        return iter(self._errors.items())

    @property
    def counts(self) -> dict[str, int]:
        """Number of images by reason, the commonest first."""
        return dict(Counter(error.reason for error in self._errors.values()).most_common())

    def report(self, where: str | PathLike[str], total: int) -> None:
        """Log how many of `total` images are left out, and where they are listed."""
        listed = [] if self._written is None else [f"listed in {self._written}"]
        report(where, total, self.counts, what="images", examples=listed or list(self._errors))

    def write(self, path: str | PathLike[str]) -> None:
        """Write one JSON object a line: `image`, `reason`, `message`."""
        write_jsonl(path, ({"image": name, "reason": error.reason, "message": str(error)} for name, error in self))
        self._written = Path(path)

    def check(self, total: int, max_share: float = 0.01) -> None:
        """Raise `DataError` when more than `max_share` (0 to 1) of `total` images are bad."""
        if len(self) <= max_share * total:
            return
        by_reason = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
        examples = "\n".join(f"  {error.reason}: {error}" for _, error in list(self)[:3])
        listed = f"; all are listed in {self._written}" if self._written else ""
        raise DataError(
            f"{len(self)} of {total} images are bad ({by_reason}), expected at most {max_share:.2%} "
            f"(max_bad_share {max_share}); repair the files or raise max_bad_share{listed}\n{examples}"
        )
