"""GQA: questions composed from scene graphs of Visual Genome's images. https://cs.stanford.edu/people/dorarad/gqa"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.rows import Row, read_json_object
from frozenprefix.data.sources.selection import files_of


class GqaSource(SourceConfig):
    """`{"QUESTION_ID": {"imageId", "question", "answer", "fullAnswer", "types": {"structural"}}, …}`.

    The target is the short answer; `metadata` has the whole sentence as `full_answer`, and the structural type (query,
    verify, logical, choose, compare) as `question_type`. Questions without an answer (test, challenge) have no target.

    Example:
        >>> GqaSource(path="gqa").questions
        '*_balanced_questions.json'
    """

    type: Literal["gqa"] = "gqa"
    questions: str = Field(
        "*_balanced_questions.json", description="file, or pattern of files, whose names tell the split"
    )
    images: str = Field("images", description="folder of the images, named ID.jpg")

    def read(self, root: Path) -> list[Sample]:
        samples = []
        for file, split in files_of(root, self.questions, self.split).items():
            questions = read_json_object(file)
            samples += [self._sample(number, questions.row(number), split, root) for number in questions.fields()]
        return samples

    def _sample(self, number: str, row: Row, split: str | None, root: Path) -> Sample:
        image_id = row.identifier("imageId")
        metadata: dict[str, Any] = {"image_id": image_id}
        if "types" in row:
            metadata["question_type"] = row.row("types").text("structural")
        if "fullAnswer" in row:
            metadata["full_answer"] = row.text("fullAnswer")
        answers = (row.text("answer"),) if "answer" in row else ()
        if answers:
            metadata["answers"] = answers
        return Sample(
            id=number,
            images=(root / self.images / f"{image_id}.jpg",),
            targets=answers,
            question=row.text("question"),
            split=split,
            task="vqa",
            metadata=metadata,
            where=row.where,
        )
