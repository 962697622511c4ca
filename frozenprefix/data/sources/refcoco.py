"""RefCOCO, RefCOCO+ and RefCOCOg (Kazemzadeh et al. 2014, Yu et al. 2016): phrases and the boxes of what they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from frozenprefix.data.boxes import Box, format_box
from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.rows import Row, read_json_object, read_rows, rows_by_id
from frozenprefix.errors import DataError

_PICKLES = (".p", ".pkl", ".pickle")


class RefCocoSource(SourceConfig):
    """References (`refs.json`), boxes in COCO's form (`instances.json`), and the folder of the images.

    A sample a sentence: its question asks where the phrase is, its target is the box as text (`format_box`), and
    `metadata` has the `box` and the `phrase`. The split is that of the reference: train, val, testA, testB, test.

    Example:
        >>> RefCocoSource(path="refcoco", images="train2014").question
        'Where is {phrase}?'
    """

    type: Literal["refcoco"] = "refcoco"
    refs: str = Field("refs.json", description="references, as JSON")
    instances: str = Field("instances.json", description="images and boxes, in COCO's form")
    images: str = Field("images", description="folder of the images under `path`, e.g. train2014")
    question: str = Field("Where is {phrase}?", description="the question, with the phrase in it")
    step: int = Field(1, ge=1, le=25, description="round boxes to multiples of so many percent")

    @field_validator("question")
    @classmethod
    def _names_the_phrase(cls, question: str) -> str:
        if "{phrase}" not in question:
            raise ValueError("expected {phrase} in it")
        return question

    def read(self, root: Path) -> list[Sample]:
        file = read_json_object(root / self.instances)
        images = rows_by_id(file.rows("images"), "id")
        annotations = rows_by_id(file.rows("annotations"), "id")
        return [
            sample for ref in self._refs(root / self.refs) for sample in self._samples(ref, annotations, images, root)
        ]

    @staticmethod
    def _refs(path: Path) -> list[Row]:
        if path.suffix in _PICKLES:
            raise DataError(
                f"{path}: a pickle runs code when it is read, so this package reads none; where you trust the file, "
                "write it as JSON: python -c \"import json, pickle; json.dump(pickle.load(open('refs.p', 'rb')), "
                "open('refs.json', 'w'))\""
            )
        return [row for _, row in read_rows(path)]

    def _samples(self, ref: Row, annotations: dict[str, Row], images: dict[str, Row], root: Path) -> list[Sample]:
        annotation = _named(ref, "ann_id", annotations, self.instances)
        image = _named(annotation, "image_id", images, self.instances)
        box = _box(annotation, image)
        target = format_box(box, self.step)
        samples = []
        for number, sentence in enumerate(ref.rows("sentences")):
            phrase = sentence.text(sentence.either("sent", "raw")).strip()
            metadata: dict[str, Any] = {"box": box, "phrase": phrase, "image_id": image.identifier("id")}
            samples.append(
                Sample(
                    id=f"{ref.identifier('ref_id')}.{number}",
                    images=(root / self.images / image.text("file_name"),),
                    targets=(target,),
                    question=self.question.replace("{phrase}", phrase),
                    split=ref.text_or_none("split"),
                    task="vqa",
                    metadata=metadata,
                    where=sentence.where,
                )
            )
        return samples


def _named(row: Row, field: str, rows: dict[str, Row], file: str) -> Row:
    name = row.identifier(field)
    if name not in rows:
        raise DataError(f"{row.where}: field '{field}': got {name}, expected an id that {file} has")
    return rows[name]


def _box(annotation: Row, image: Row) -> Box:
    """COCO's [left, top, width, height] in pixels, as shares of the image; what juts out by rounding is cut off."""
    values = annotation.values("bbox")
    width, height = image.integer("width"), image.integer("height")
    is_image = width > 0 and height > 0
    if (
        is_image
        and len(values) == 4
        and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    ):
        left, top, wide, high = values
        right, bottom = min(1.0, (left + wide) / width), min(1.0, (top + high) / height)
        left, top = max(0.0, left / width), max(0.0, top / height)
        if left < right and top < bottom:
            return left, top, right, bottom
    raise DataError(
        f"{annotation.where}: field 'bbox': got {values}, expected left, top, width and height in pixels, inside the "
        f"image of {width} × {height}"
    )
