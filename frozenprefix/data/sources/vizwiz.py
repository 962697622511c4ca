"""VizWiz-VQA: photos taken by blind people and what they asked about them. https://vizwiz.org/tasks-and-datasets/vqa"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.qa import commonest
from frozenprefix.data.sources.rows import Row, read_rows
from frozenprefix.data.sources.selection import files_of


class VizWizSource(SourceConfig):
    """`Annotations/train.json`: a list of `{"image", "question", "answers": [{"answer"}, …], "answer_type"}`.

    The target is the commonest of the ten answers; `metadata["answers"]` has all, `metadata["answerable"]` whether most
    people could answer. The test part has no answers and no targets. The id is the image's name, as every image has
    one question. The captions of the same images are read by source `coco`.

    Example:
        >>> VizWizSource(path="vizwiz").annotations
        'Annotations/*.json'
    """

    type: Literal["vizwiz"] = "vizwiz"
    annotations: str = Field("Annotations/*.json", description="file, or pattern of files, whose names tell the split")
    images: str = Field("{split}", description="folder of a split's images")

    def read(self, root: Path) -> list[Sample]:
        samples = []
        for file, split in files_of(root, self.annotations, self.split).items():
            samples += [self._sample(row, split, root) for _, row in read_rows(file)]
        return samples

    def _sample(self, row: Row, split: str | None, root: Path) -> Sample:
        name = row.text("image")
        metadata: dict[str, Any] = {}
        answers: tuple[str, ...] = ()
        if "answers" in row:
            answers = tuple(text for answer in row.rows("answers") for text in answer.texts("answer"))
            metadata["answers"] = answers
        if "answer_type" in row:
            metadata["answer_type"] = row.text("answer_type")
        if "answerable" in row:
            metadata["answerable"] = bool(row.integer("answerable"))
        return Sample(
            id=name,
            images=(root / self.images.replace("{split}", split or "") / name,),
            targets=commonest(answers),
            question=row.text("question"),
            split=split,
            task="vqa",
            metadata=metadata,
            where=row.where,
        )
