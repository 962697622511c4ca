"""Captions as files: JSON lines, a table, a text beside each image, and descriptions in the images' metadata."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frozenprefix.errors import DataError
from frozenprefix.utils.damage import refusing_damage
from frozenprefix.utils.description import WRITABLE, with_description, xmp_path, xmp_with
from frozenprefix.utils.files import atomic_file, write_text_atomic
from frozenprefix.utils.jsonl import append_jsonl
from frozenprefix.utils.outputs import check_output

FIELDS = ("image", "caption", "score")
SIDECAR, ORIGINALS = "sidecar", "originals"


class JsonlWriter:
    """Writes `image`, `caption` and `score`, one object a line, each as soon as it is there.

    Example:
        >>> JsonlWriter(tmp_path / "c.jsonl").write(image_path, "a circle", -0.5)
        >>> (tmp_path / "c.jsonl").read_text()[-38:]
        '"caption": "a circle", "score": -0.5}\\n'
    """

    def __init__(self, out: Path, *, force: bool = False):
        check_output(out, set(FIELDS), exact=True, force=force)
        self.out = out
        self._started = False

    def write(self, image: Path, caption: str, score: float | None) -> None:
        if not self._started and self.out.is_file():
            self.out.unlink()
        self._started = True
        append_jsonl(self.out, [{"image": str(image), "caption": caption, "score": score}])

    def finish(self) -> None:
        """Leave an empty file where there was no caption."""
        if not self._started:
            write_text_atomic(self.out, "")


class CsvWriter:
    r"""A table with a row per image, as Excel opens it: UTF-8 with a mark, commas, quotes where they are needed.

    Example:
        >>> CsvWriter(tmp_path / "c.csv").write(Path("1.jpg"), 'a "big" dog', -0.5)
        >>> (tmp_path / "c.csv").read_text(encoding="utf-8-sig")
        'image,caption,score\n1.jpg,"a ""big"" dog",-0.5\n'
    """

    def __init__(self, out: Path, *, force: bool = False):
        check_output(out, (), force=force or _is_own_table(out))
        self.out = out
        self._started = False

    def write(self, image: Path, caption: str, score: float | None) -> None:
        self._append([str(image), caption, "" if score is None else score])

    def finish(self) -> None:
        if not self._started:
            self._append(None)

    def _append(self, row: Sequence[Any] | None) -> None:
        buffer = io.StringIO()
        rows = csv.writer(buffer, lineterminator="\n")
        if not self._started:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_bytes(b"\xef\xbb\xbf")
            rows.writerow(FIELDS)
        self._started = True
        if row is not None:
            rows.writerow(row)
        with self.out.open("ab") as file:
            file.write(buffer.getvalue().encode("utf-8", errors="backslashreplace"))


class TextWriter:
    """A text file for each image: IMG_1.txt beside IMG_1.jpg, or in another folder with the same folders in it.

    Args:
        images: all of them; an existing text file beside one is refused, unless `force` is given.
        out: folder of the text files; None: beside the images.

    Example:
        >>> TextWriter([image_path], out=tmp_path).write(image_path, "a circle", -0.5)
        >>> (tmp_path / "red_circle.txt").read_text()
        'a circle\\n'
    """

    def __init__(self, images: Sequence[Path], *, out: Path | None = None, force: bool = False):
        self._places = places_in(images, out) if out else {image: image for image in images}
        self._places = {image: place.with_suffix(".txt") for image, place in self._places.items()}
        refuse_existing(self._places.values(), force=force)

    def write(self, image: Path, caption: str, score: float | None) -> None:
        write_text_atomic(self._places[image], caption + "\n")

    def finish(self) -> None:
        """Nothing is left to do."""


class MetadataWriter:
    """Descriptions in metadata: XMP, and EXIF in JPEG files. Pixels and other metadata stay as they are.

    Args:
        where: "sidecar" writes IMG_1.xmp beside each image, and adds to one that is there; "originals" changes the
            images themselves; anything else is the folder of copies, and leaves the originals as they are.

    Raises:
        DataError: an image can hold no description, or a copy is there already.

    Example:
        >>> from frozenprefix.utils.description import description_in
        >>> MetadataWriter([image_path], str(tmp_path)).write(image_path, "a circle", -0.5)
        >>> description_in((tmp_path / "red_circle.png").read_bytes())
        'a circle'
    """

    def __init__(self, images: Sequence[Path], where: str, *, force: bool = False):
        self.where = where
        self._places = {image: image for image in images}
        if where == SIDECAR:
            return
        others = [str(image) for image in images if image.suffix.lower() not in WRITABLE]
        if others:
            listed = ", ".join(others[:3])
            raise DataError(
                f"--write-metadata: {len(others)} images are no JPEG or PNG and cannot hold a description ({listed}); "
                f"--write-metadata {SIDECAR} writes .xmp files beside images of all kinds"
            )
        if where != ORIGINALS:
            self._places = places_in(images, Path(where))
            refuse_existing(self._places.values(), force=force)

    def write(self, image: Path, caption: str, score: float | None) -> None:
        if self.where == SIDECAR:
            place = xmp_path(image)
            with refusing_damage(DataError, f"{place}: cannot be read ({{reason}}); move it away"):
                data = xmp_with(caption, place.read_bytes() if place.is_file() else None)
        else:
            place, data = self._places[image], with_description(image.read_bytes(), caption, str(image))
        with atomic_file(place) as draft:
            draft.write_bytes(data)
            if self.where != SIDECAR:
                shutil.copymode(image, draft)

    def finish(self) -> None:
        """Nothing is left to do."""


def places_in(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Image → its place in another folder, with the folders that are below those which all images share.

    Example:
        >>> places_in([Path("a/1.jpg"), Path("a/b/2.jpg")], Path("out"))[Path("a/b/2.jpg")].as_posix()
        'out/b/2.jpg'
    """
    whole = {image: Path(os.path.abspath(image)) for image in images}
    top = os.path.commonpath([path.parent for path in whole.values()]) if whole else ""
    return {image: folder / path.relative_to(top) for image, path in whole.items()}


def refuse_existing(places: Any, *, force: bool) -> None:
    """Check that files can be written, and that no two are the same.

    Raises:
        DataError: a file is there, or two images would have the same one.

    Example:
        >>> refuse_existing([image_path], force=False)
        Traceback (most recent call last):
        frozenprefix.errors.DataError: 1 files are there already, the first is '...red_circle.png'; ...
    """
    seen: set[Path] = set()
    for place in places:
        if place in seen:
            raise DataError(f"'{place}' would be written for two images; caption their folders one by one")
        seen.add(place)
    there = [] if force else [place for place in seen if place.exists()]
    if there:
        raise DataError(
            f"{len(there)} files are there already, the first is '{min(there)}'; give --force to replace them, or "
            "another folder"
        )


def _is_own_table(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.readline().removeprefix(b"\xef\xbb\xbf").strip() == ",".join(FIELDS).encode()
