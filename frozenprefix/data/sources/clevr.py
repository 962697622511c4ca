"""CLEVR and CLEVR-CoGenT: rendered scenes and generated questions. https://cs.stanford.edu/people/jcjohns/clevr"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.rows import Row, read_json_object
from frozenprefix.data.sources.selection import files_of


class ClevrSource(SourceConfig):
    """`{"questions": [{"image_filename", "split", "question_index", "question", "answer", "program": […]}, …]}`.

    `metadata["question_type"]` is the last function of the question's program: count, exist, query_color, …; the test
    part has neither program nor answer. The id is SPLIT/QUESTION_INDEX.

    Example:
        >>> ClevrSource(path="CLEVR_v1.0").questions
        'questions/*_questions.json'
    """

    type: Literal["clevr"] = "clevr"
    questions: str = Field("questions/*_questions.json", description="question file, or pattern of several")
    images: str = Field("images/{split}", description="folder of a split's images")

    def read(self, root: Path) -> list[Sample]:
        samples = []
        for file in files_of(root, self.questions, self.split):
            samples += [self._sample(row, root) for row in read_json_object(file).rows("questions")]
        return samples

    def _sample(self, row: Row, root: Path) -> Sample:
        split = row.text("split")
        answers = (row.text("answer"),) if "answer" in row else ()
        metadata: dict[str, Any] = {"answers": answers} if answers else {}
        steps = row.rows("program") if "program" in row else []
        if steps:
            metadata["question_type"] = steps[-1].text("function" if "function" in steps[-1] else "type")
        return Sample(
            id=f"{split}/{row.integer('question_index')}",
            images=(root / self.images.replace("{split}", split) / row.text("image_filename"),),
            targets=answers,
            question=row.text("question"),
            split=split,
            task="vqa",
            metadata=metadata,
            where=row.where,
        )
