"""A folder of images: to be captioned, or labelled by the names of their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from frozenprefix.data.images import find_images
from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.rows import Row, read_json_object
from frozenprefix.errors import DataError


class ImageFolderSource(SourceConfig):
    """All images under `path`, however deep, sorted by name; the id is the path under `path`.

    With `labels`, an image is a sample of task "classification" whose target is the name of the folder it is in;
    `label_file` gives folders other names: `{"n02084071": "dog"}`. With `split_folders`, the first folder below `path`
    is the split: `train/cat/1.jpg`.

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
            targets=() if label is None else (label,),
            split=folders[0] if self.split_folders else None,
            task="caption" if label is None else "classification",
            metadata={} if label is None else {"label": label},
        )
