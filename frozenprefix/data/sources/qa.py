"""A folder with `qa.jsonl` or `qa.json`: one question per row, with image(s), answer(s) and split."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.rows import Row, read_rows
from frozenprefix.errors import DataError


class QaSource(SourceConfig):
    """Rows of `image`, `question`, `answer` or `answers`, and optionally `split`, `id` and `type` (of question).

    Every answer goes to `metadata["answers"]`; the target is the commonest of them, or each distinct answer is one.
    `image` may be a list: the question is about all of them, and the prompt shows them in this order. A row without an
    id is called `IMAGE#NUMBER` by its (first) image and its line (JSON lines) or its place in the list (JSON).

    Example:
        >>> QaSource(path=str(data_folder)).read(data_folder)[0].task
        'vqa'
    """

    type: Literal["qa"] = "qa"
    file: str | None = Field(None, description="the file's place under `path`; qa.jsonl or qa.json when not given")
    learn: Literal["commonest", "all"] = Field("commonest", description="which of several answers are targets")
    underscores: Literal["keep", "space"] = Field("keep", description="'space' reads plastic_cup as two words")

    def read(self, root: Path) -> list[Sample]:
        return [self._sample(number, row, root) for number, row in read_rows(self._file(root))]

    def _file(self, root: Path) -> Path:
        if self.file is not None:
            return root / self.file
        for name in ("qa.jsonl", "qa.json"):
            if (root / name).exists():
                return root / name
        raise DataError(f"{root}: has neither qa.jsonl nor qa.json; name the question file in `file`")

    def _sample(self, number: int, row: Row, root: Path) -> Sample:
        images, question = row.names("image"), row.text("question")
        answers = row.texts(row.either("answers", "answer"))
        if self.underscores == "space":
            question, answers = question.replace("_", " "), tuple(answer.replace("_", " ") for answer in answers)
        metadata: dict[str, object] = {"answers": answers}
        if "type" in row:
            metadata["question_type"] = row.text("type")
        return Sample(
            id=row.identifier("id") if "id" in row else f"{images[0]}#{number}",
            images=tuple(root / name for name in images),
            targets=commonest(answers) if self.learn == "commonest" else tuple(dict.fromkeys(answers)),
            question=question,
            split=row.text_or_none("split"),
            task="vqa",
            metadata=metadata,
            where=row.where,
        )


def commonest(answers: tuple[str, ...]) -> tuple[str, ...]:
    """The answer given most often, the first of several such; nothing for no answers.

    Example:
        >>> commonest(("red", "blue", "blue"))
        ('blue',)
    """
    return (max(answers, key=answers.count),) if answers else ()
