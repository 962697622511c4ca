"""VQAv2's official question and annotation files and OK-VQA's, which are of the same form. https://visualqa.org/vqa_v1_data_format"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.qa import commonest
from frozenprefix.data.sources.rows import Row, read_json_object, rows_by_id
from frozenprefix.errors import DataError


class VqaV2Source(SourceConfig):
    """One question file, its annotation file, and the folder of its images, all under `path`.

    The target is the annotation's `multiple_choice_answer`, or the commonest answer where there is none (OK-VQA);
    `metadata["answers"]` has the ten human answers. Without `annotations` (the test parts) there are no targets. The
    split is the file's `data_subtype` without the year.

    Example:
        >>> VqaV2Source(path="vqa", questions="questions.json", images="val2014").file_pattern
        'COCO_{subtype}_{image_id:012d}.jpg'
    """

    type: Literal["vqa_v2"] = "vqa_v2"
    questions: str = Field(description="question file, e.g. v2_OpenEnded_mscoco_val2014_questions.json")
    annotations: str | None = Field(None, description="annotation file, e.g. v2_mscoco_val2014_annotations.json")
    images: str = Field(description="folder of the images, e.g. val2014")
    file_pattern: str = Field("COCO_{subtype}_{image_id:012d}.jpg", description="an image's file name")

    @field_validator("file_pattern")
    @classmethod
    def _names_the_image(cls, pattern: str) -> str:
        try:
            named = pattern.format(subtype="val2014", image_id=1) != pattern.format(subtype="val2014", image_id=2)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"expected a pattern of {{image_id}} and {{subtype}} only ({error!r})") from error
        if not named:
            raise ValueError("expected {image_id} or {image_id:012d} in the pattern")
        return pattern

    def read(self, root: Path) -> list[Sample]:
        file = read_json_object(root / self.questions)
        subtype = file.text_or_none("data_subtype")
        annotations = None
        if self.annotations is not None:
            annotations = rows_by_id(read_json_object(root / self.annotations).rows("annotations"), "question_id")
        return [self._sample(question, annotations, subtype, root) for question in file.rows("questions")]

    def _sample(self, question: Row, annotations: dict[str, Row] | None, subtype: str | None, root: Path) -> Sample:
        number, image_id = question.identifier("question_id"), question.integer("image_id")
        metadata: dict[str, Any] = {"question_id": question.integer("question_id"), "image_id": image_id}
        targets: tuple[str, ...] = ()
        if annotations is not None:
            if number not in annotations:
                raise DataError(f"{question.where}: question_id {number} has no annotation in {self.annotations}")
            targets = _add_answers(metadata, annotations[number])
        name = self.file_pattern.format(image_id=image_id, subtype=subtype)
        return Sample(
            id=number,
            images=(root / self.images / name,),
            targets=targets,
            question=question.text("question"),
            split=None if subtype is None else re.sub(r"\d{4}$", "", subtype),
            task="vqa",
            metadata=metadata,
            where=question.where,
        )


def _add_answers(metadata: dict[str, Any], annotation: Row) -> tuple[str, ...]:
    answers = metadata["answers"] = tuple(answer.text("answer") for answer in annotation.rows("answers"))
    for field in ("question_type", "answer_type"):
        if field in annotation:
            metadata[field] = annotation.text(field)
    if "multiple_choice_answer" in annotation:
        return (annotation.text("multiple_choice_answer"),)
    return commonest(answers)
