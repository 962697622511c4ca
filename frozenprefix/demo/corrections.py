"""Corrections of captions: photos and what is right about them, in the plain format that `train` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from frozenprefix.data.images import image_ending, read_image
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.utils import (
    append_jsonl,
    check_output,
    content_hash,
    hold_lock,
    read_jsonl,
    write_bytes_atomic,
    write_jsonl,
)

FILE = "captions.jsonl"
MOST_LETTERS = 500  # of a caption


@dataclass(frozen=True)
class Correction:
    """A photo, what a model wrote, and what is right.

    Attributes:
        image: relative to the folder of the corrections.

    Example:
        >>> Correction("images/1.jpg", "a cat", "a dog").right
        'a dog'
    """

    image: str
    wrong: str
    right: str


class Corrections:
    """A folder with `captions.jsonl` and the photos, a data source of type `captions`.

    A second correction of a photo replaces the first one. Several processes may write to the folder.

    Args:
        folder: made with the first correction.

    Raises:
        DataError: the folder has a captions.jsonl that holds no corrections.

    Example:
        >>> corrections = Corrections(tmp_path / "corrections")
        >>> corrections.add(image_path, "a cat", "a red circle")
        >>> [correction.right for correction in corrections]
        ['a red circle']
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        check_output(self.folder / FILE, {"image", "captions", "split", "rejected"}, option="--corrections")

    def add(self, photo: Path, wrong: str, right: str) -> None:
        """Keep a correction, and a copy of the photo.

        Raises:
            ConfigError: for a text that is empty, too long, or the same as before.
            BadImageError: for a photo that cannot be read.
        """
        right, wrong = " ".join(right.split()), " ".join(wrong.split())
        if not right or len(right) > MOST_LETTERS:
            raise ConfigError(f"correction: got {len(right)} letters, expected a caption of 1 to {MOST_LETTERS}")
        if right == wrong:
            raise ConfigError("correction: got the caption that is there already, expected what is right")
        data = read_image(photo)
        place = self.folder / "images" / f"{content_hash(data)[:16]}{image_ending(photo.name) or '.img'}"
        row = {"image": f"images/{place.name}", "captions": [right], "split": "train", "rejected": wrong}
        with hold_lock(self.folder / ".lock", f"corrections '{self.folder}'", wait=True):
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                write_bytes_atomic(place, data)
            rows = self._rows()
            others = [old for old in rows if old["image"] != row["image"]]
            if len(others) == len(rows):
                append_jsonl(self.folder / FILE, [row])
            else:
                write_jsonl(self.folder / FILE, [*others, row])

    def __iter__(self):
        return iter([Correction(row["image"], str(row["rejected"]), row["captions"][0]) for row in self._rows()])

    def __len__(self) -> int:
        return len(self._rows())

    def path_of(self, correction: Correction) -> Path:
        """The photo of a correction."""
        return self.folder / correction.image

    def _rows(self) -> list[dict]:
        file = self.folder / FILE
        rows = [row for _, row in read_jsonl(file, skip_damaged=True)] if file.is_file() else []
        for number, row in enumerate(rows, start=1):
            if not (isinstance(row, dict) and row.keys() >= {"image", "captions", "rejected"} and row["captions"]):
                raise DataError(f"{file}:{number}: got {str(row)[:60]!r}, expected a correction")
        return rows
