"""COCO captions as published: `captions_train2017.json` and a folder of images; VizWiz-Captions has the same form."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.rows import Row, read_json_object
from frozenprefix.data.sources.selection import split_in_name
from frozenprefix.errors import DataError
from frozenprefix.utils import report


class CocoSource(SourceConfig):
    """One sample per image, with all its captions. The split is read from the file name.

    Example:
        >>> CocoSource(path="coco", annotations="annotations/captions_val2017.json", images="val2017").type
        'coco'
    """

    type: Literal["coco"] = "coco"
    annotations: str = Field(description="file under `path`, e.g. annotations/captions_val2017.json")
    images: str = Field(description="folder of the images under `path`, e.g. val2017")

    def read(self, root: Path) -> list[Sample]:
        file = read_json_object(root / self.annotations)
        images = _images(file)
        captions: dict[str, list[str]] = {image_id: [] for image_id in images}
        rows = file.rows("annotations") if "annotations" in file else []
        seen: set[tuple[str, ...]] = set()
        repeated = 0
        for row in rows:
            image_id = row.identifier("image_id")
            if image_id not in captions:
                raise DataError(f"{row.where}: field 'image_id': got {image_id}, expected the id of one of `images`")
            texts = tuple(text.strip() for text in row.texts("caption"))
            key = (row.identifier("id"), image_id, *texts) if "id" in row else (row.where,)
            if key in seen:
                repeated += 1
            else:
                captions[image_id].extend(texts)
            seen.add(key)
        where = root / self.annotations
        listed = len(file.rows("images"))
        report(where, listed, {"listed twice": listed - len(images)}, done="joined", what="images")
        report(where, len(rows), {"listed twice": repeated}, done="joined", what="annotations")
        split = split_in_name(Path(self.annotations).name)
        return [
            Sample(
                id=image_id,
                images=(root / self.images / row.text("file_name"),),
                targets=tuple(captions[image_id]),
                split=split,
                metadata={"image_id": image_id},
                where=row.where,
            )
            for image_id, row in images.items()
        ]


def _images(file: Row) -> dict[str, Row]:
    """Rows of images by id. The same image may be listed twice, as in joined files; two images may not share an id."""
    images: dict[str, Row] = {}
    for row in file.rows("images"):
        image_id, name = row.identifier("id"), row.text("file_name")
        other = images.setdefault(image_id, row)
        if other.text("file_name") != name:
            raise DataError(
                f"{row.where}: field 'id': got {image_id} for {name}, which is the id of {other.text('file_name')} in "
                f"{other.where} too"
            )
    return images
