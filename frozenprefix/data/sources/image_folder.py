"""A folder of pictures, to be captioned or to be named after their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.errors import DataError

_EXTENSIONS = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFolderSource(SourceConfig):
    """All pictures under `path`, however deep, sorted by name; the id is the place under `path`.

    With `labels`, a picture's target is the name of the folder it lies in. With `split_folders`, the first folder
    below `path` is the split: `train/cat/1.jpg`.
    """

    type: Literal["image_folder"] = "image_folder"
    labels: bool = Field(False, description="take the folder's name as the target")
    split_folders: bool = Field(False, description="take the first folder's name as the split")
    extensions: list[str] = Field(list(_EXTENSIONS), min_length=1, description="file name endings, with the dot")

    def read(self, root: Path) -> list[Sample]:
        endings = {extension.lower() for extension in self.extensions}
        files = sorted(path for path in root.rglob("*") if path.suffix.lower() in endings and path.is_file())
        if not files:
            raise DataError(f"{root}: got no picture, expected files ending in {', '.join(sorted(endings))}")
        return [self._sample(path, root) for path in files]

    def _sample(self, path: Path, root: Path) -> Sample:
        folders = path.relative_to(root).parts[:-1]
        needed = int(self.labels) + int(self.split_folders)
        if len(folders) < needed:
            form = "/".join(["SPLIT"] * self.split_folders + ["LABEL"] * self.labels + ["PICTURE"])
            raise DataError(f"{path}: lies too high in the folder, expected {root}/{form}")
        return Sample(
            id=path.relative_to(root).as_posix(),
            images=(path,),
            targets=(folders[-1],) if self.labels else (),
            split=folders[0] if self.split_folders else None,
            metadata={"label": folders[-1]} if self.labels else {},
        )
