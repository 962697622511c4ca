"""What is dropped on the page: photos, clips and folders of them; everything else is named with its reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from frozenprefix.data.images import load_image, walk_files
from frozenprefix.errors import BadImageError, FrozenPrefixError
from frozenprefix.inference import Clip

CLIP_ENDINGS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv")
PREVIEW_SIDE = 768  # pixels
MOST_ITEMS = 200  # of one session


@dataclass(frozen=True)
class Item:
    """A photo or a clip that can be read, and what the page shows of it: RGB, at most `PREVIEW_SIDE` wide and high.

    Example:
        >>> Item(image_path, "photo", image).name
        'red_circle.png'
    """

    path: Path
    kind: Literal["photo", "clip"]
    preview: Image.Image

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.path.name


def read_items(paths: Iterable[str | Path]) -> tuple[list[Item], list[str]]:
    """Read files, and all files in folders, however deep.

    Returns:
        The items in order, and for each file that is none the name and the reason.

    Example:
        >>> _ = (tmp_path / "notes.txt").write_text("a dog")
        >>> items, problems = read_items([image_path, tmp_path / "notes.txt"])
        >>> [item.name for item in items], problems
        (['red_circle.png'], ['notes.txt: neither an image nor a clip'])
    """
    items: list[Item] = []
    problems: list[str] = []
    for path in map(Path, paths):
        for file in walk_files(path) if path.is_dir() else [path]:
            if len(items) >= MOST_ITEMS:
                problems.append(f"{file.name}: left out, as the page holds {MOST_ITEMS} files at a time")
                continue
            try:
                items.append(read_item(file))
            except FrozenPrefixError as error:
                problems.append(_reason(file, error))
    return items, problems


def read_item(path: Path) -> Item:
    """Read one file.

    Raises:
        BadImageError: with the reasons of `load_image` and `open_video`.
        ConfigError: for a clip, without PyAV.
    """
    if path.suffix.lower() not in CLIP_ENDINGS:
        return Item(path, "photo", _preview(load_image(path)))
    clip = Clip(path)
    (frame,) = clip.at([clip.index_at(clip.duration / 2)])
    return Item(path, "clip", _preview(frame.image))


def _preview(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    return image


def _reason(path: Path, error: FrozenPrefixError) -> str:
    if isinstance(error, BadImageError) and error.reason in ("not_an_image", "unsupported"):
        return f"{path.name}: neither an image nor a clip"
    return f"{path.name}: {str(error).removeprefix(f'{path}: ')}"
