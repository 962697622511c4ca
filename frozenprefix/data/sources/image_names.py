"""Which file a name in a table means: names without ending, paths of another machine, names that an export changed."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from frozenprefix.data.images import image_ending, walk_files
from frozenprefix.errors import DataError

#: What programs add to the name of a version of a photo: a copy's number, or a word for what was done to it.
_NUMBER = re.compile(r" ?\(\d{1,3}\)$|-\d{1,2}$")
_WORD = re.compile(
    r"[-_ ](?:edited|edit|bearbeitet|copy|copie|kopie|export|enhanced|enhanced-nr|hdr|pano|web|small|resized|print)$",
    re.IGNORECASE,
)
_APPLE_EDIT = re.compile(r"^(IMG_)E(?=\d{4})")  # IMG_E0001 is what became of IMG_0001


class ImageNames:
    """The images in a folder, however deep, found by what a table calls them.

    Args:
        folder: where the images are.

    Raises:
        DataError: the folder does not exist.

    Example:
        >>> names = ImageNames(images_folder)
        >>> names.find("C:\\\\Users\\\\me\\\\Red_Circle.JPG").name
        'red_circle.png'
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise DataError(f"{folder}: got no folder, expected a folder of images")
        self.folder = folder
        self.files = [path for path in walk_files(folder) if image_ending(path.name)]
        self._whole: dict[str, list[Path]] = defaultdict(list)  # path, or the end of it → files
        self._stems: dict[str, list[Path]] = defaultdict(list)
        self._photos: dict[str, list[Path]] = defaultdict(list)  # name of the photo that a file is a version of
        for path in self.files:
            relative = path.relative_to(folder)
            for end in _ends(_key(relative.as_posix())):
                self._whole[end].append(path)
            for end in _ends(_key(relative.with_suffix("").as_posix())):
                self._stems[end].append(path)
            for version in versions_of(path.stem):
                self._photos[_key(version)].append(path)

    def find(self, name: str) -> Path | None:
        """The file of a name, or None.

        In this order: the path under the folder; the end of a path that has most parts in common; the same without
        the ending of the name; a version of a photo of that name, if there is just one, such as `IMG_1-2.jpg` or
        `IMG_1_edited.jpg` for `IMG_1`. Capitals, Unicode forms and the kind of slash play no part.

        Raises:
            DataError: several files fit.
        """
        name = _path_in(name)
        if not name:
            return None
        key = _key(name)
        for table, wanted in ((self._whole, key), (self._stems, _without_ending(key)), (self._stems, key)):
            for end in _ends(wanted):
                if end in table:
                    return self._one_of(table[end], name, wanted)
        versions = self._photos.get(_without_ending(key.rpartition("/")[2]), [])
        return versions[0] if len(versions) == 1 else None

    def _one_of(self, files: list[Path], name: str, key: str) -> Path:
        """The only file; of several the one with exactly this path, then the one with these capitals."""
        if len(files) == 1:
            return files[0]
        relative = {path: path.relative_to(self.folder).as_posix() for path in files}
        exact = [path for path in files if _key(relative[path]) == key or _without_ending(_key(relative[path])) == key]
        exact = exact if len(exact) == 1 else [path for path in exact or files if relative[path].endswith(name)]
        if len(exact) == 1:
            return exact[0]
        listed = ", ".join(sorted(relative.values())[:3])
        raise DataError(f"got '{name}', which may be any of {len(files)} images ({listed}); write more of its path")


def versions_of(stem: str) -> list[str]:
    """Names of the photo that a file may be a version of, by what programs add to names; none for a plain name.

    Example:
        >>> versions_of("IMG_0001-2"), versions_of("IMG_0001_edited (1)"), versions_of("IMG_0001")
        (['IMG_0001'], ['IMG_0001_edited', 'IMG_0001'], [])
    """
    found: list[str] = []
    shorter = stem
    while True:
        for pattern in (_NUMBER, _WORD):
            if (cut := pattern.sub("", shorter)) != shorter and cut:
                break
        else:
            cut = _APPLE_EDIT.sub(r"\1", shorter)
            if cut == shorter:
                return found
        found.append(cut)
        shorter = cut


def photo_names(names: Collection[str]) -> dict[str, str]:
    """Names of images → the name of the photo that each is a version of, without ending; its own name for most.

    A number is taken off only where the photo without it is there too: beach-1 and beach-2 are two photos.

    Example:
        >>> photo_names(["a/1.jpg", "a/1-2.jpg", "a/1_edited.png", "a/b-1.jpg"])
        {'a/1.jpg': 'a/1', 'a/1-2.jpg': 'a/1', 'a/1_edited.png': 'a/1', 'a/b-1.jpg': 'a/b-1'}
    """
    stems = {str(PurePosixPath(name).with_suffix("")) for name in names}
    photos = {}
    for name in names:
        path = PurePosixPath(name).with_suffix("")
        photo = str(path)
        for version in versions_of(path.name):
            candidate = str(path.with_name(version))
            if candidate in stems or _WORD.search(photo) or _APPLE_EDIT.match(PurePosixPath(photo).name):
                photo = candidate
        photos[name] = photo
    return photos


def has_versions(names: Iterable[str]) -> bool:
    """Whether some images are versions of the same photo.

    Example:
        >>> has_versions(["1.jpg", "1 (1).jpg"]), has_versions(["1.jpg", "2.jpg"])
        (True, False)
    """
    photos = photo_names(list(names))
    return len(set(photos.values())) < len(photos)


def _path_in(name: str) -> str:
    """The path in a name: slashes of Windows and addresses become those of this system."""
    name = name.strip().strip("\"'<>")
    if "://" in name:
        name = unquote(urlsplit(name).path)
    return name.replace("\\", "/").strip("/")


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _without_ending(name: str) -> str:
    ending = image_ending(name)
    return name[: -len(ending)] if ending else re.sub(r"\.(?:cr2|cr3|nef|arw|dng|orf|rw2|raf|raw|psd|mov)$", "", name)


def _ends(path: str) -> list[str]:
    """A path, and every end of it: the longest first."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return ["/".join(parts[place:]) for place in range(len(parts))]
