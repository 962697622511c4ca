"""A folder of images: to be captioned, labelled by the names of their folders, or with a text file beside each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from frozenprefix.data.images import find_images
from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.rows import Row, read_json_object
from frozenprefix.data.sources.spreadsheets import decode_table
from frozenprefix.errors import DataError


class ImageFolderSource(SourceConfig):
    """All images under `path`, however deep, sorted by name; the id is the path under `path`.

    With `labels`, an image is a sample of task "classification" whose target is the name of the folder it is in;
    `label_file` gives folders other names: `{"n02084071": "dog"}`. With `split_folders`, the first folder below `path`
    is the split: `train/cat/1.jpg`. With `texts: ".txt"`, the captions of 1.jpg are the lines of 1.txt or 1.jpg.txt, in
    any encoding that `csv` reads; an image without such a file has none.

    Example:
        >>> len(ImageFolderSource(path=str(data_folder)).read(data_folder))
        12
    """

    type: Literal["image_folder"] = "image_folder"
    labels: bool = Field(False, description="take the folder's name as the target")
    label_file: str | None = Field(None, description="JSON file under `path`: folder's name to label; for all folders")
    split_folders: bool = Field(False, description="take the first folder's name as the split")
    extensions: list[str] | None = Field(
        None, min_length=1, description="file name endings, with the dot; null: all that Pillow reads"
    )

    texts: str | None = Field(None, pattern=r"^\.\w+$", description="ending of the text files beside the images: .txt")

    @model_validator(mode="after")
    def _one_kind_of_target(self) -> ImageFolderSource:
        if self.labels and self.texts is not None:
            raise ValueError("`labels` and `texts` are two kinds of targets; name one of them")
        return self

    def read(self, root: Path) -> list[Sample]:
        endings = None if self.extensions is None else [ending.lower() for ending in self.extensions]
        names = read_json_object(root / self.label_file) if self.labels and self.label_file else None
        return [self._sample(path, root, names) for path in find_images(root, endings)]

    def _sample(self, path: Path, root: Path, names: Row | None) -> Sample:
        folders = path.relative_to(root).parts[:-1]
        if len(folders) < int(self.labels) + int(self.split_folders):
            form = "/".join(["SPLIT"] * self.split_folders + ["LABEL"] * self.labels + ["IMAGE"])
            raise DataError(f"{path}: is too high in the folder, expected {root}/{form}")
        label = folders[-1] if self.labels else None
        if label is not None and names is not None:
            label = names.text(label)
        return Sample(
            id=path.relative_to(root).as_posix(),
            images=(path,),
            targets=captions_beside(path, self.texts) if label is None else (label,),
            split=folders[0] if self.split_folders else None,
            task="caption" if label is None else "classification",
            metadata={} if label is None else {"label": label},
        )


def captions_beside(image: Path, ending: str | None) -> tuple[str, ...]:
    """The lines of the text file beside an image that are not blank; nothing without such a file.

    Example:
        >>> captions_beside(image_path, ".txt")
        ()
    """
    file = text_file_beside(image, ending) if ending else None
    if file is None:
        return ()
    lines = decode_table(file.read_bytes(), file).splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def text_file_beside(image: Path, ending: str) -> Path | None:
    """1.txt or 1.jpg.txt for 1.jpg, if there is one.

    Example:
        >>> text_file_beside(image_path, ".txt") is None
        True
    """
    places = (image.with_suffix(ending), image.with_name(image.name + ending))
    return next((place for place in places if place.is_file()), None)
