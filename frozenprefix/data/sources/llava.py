"""LLaVA's conversations: several questions and answers about an image. https://llava-vl.github.io"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.rows import Row, read_rows
from frozenprefix.data.sources.selection import split_in_name
from frozenprefix.errors import DataError
from frozenprefix.models.processing import IMAGE_TOKEN
from frozenprefix.utils import report_left_out

_QUESTION = "{question}"


class LlavaSource(SourceConfig):
    """Conversations about images, as in the training data of LLaVA (Liu et al. 2023).

    A row is `{"id", "image", "conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}`.

    Every answer is a sample of its own: its prompt holds the turns before it, its question is the last one asked. The
    turns of a conversation share their beginnings, so packing "trie" reads them once for all answers after the same
    images. Turns are written as `Dialog` writes them, by the chat template of the language model. With `prompt` they
    are plain text: `prompt` filled in, the answer, a new line.

    The `<image>` mark of a single image is removed, and the image comes first. With several images (`image` is a
    list) the marks stay where they are, and an answer's sample has the images shown so far. A row without `image` is
    a conversation in text alone, which trains a language model with trained parts; where it is frozen, such rows are
    left out. The id is ID#ROW.TURN.

    Example:
        >>> LlavaSource(path="llava", file="llava_instruct_150k.json").images
        '.'
    """

    type: Literal["llava"] = "llava"
    file: str = Field(description="JSON or JSON-lines file under `path`, e.g. llava_instruct_150k.json")
    images: str = Field(".", description="folder under `path` that the images' names start from")

    @field_validator("prompt")
    @classmethod
    def _asks(cls, prompt: str | None) -> str | None:
        if prompt is not None and (_QUESTION not in prompt or IMAGE_TOKEN in prompt):
            raise ValueError(f"expected the text of one turn, with {_QUESTION} and without {IMAGE_TOKEN}")
        return prompt

    def read(self, root: Path) -> list[Sample]:
        samples: list[Sample] = []
        rows = list(read_rows(root / self.file))
        lost = 0
        for number, row in rows:
            if "image" not in row and any(IMAGE_TOKEN in question for question, _ in _turns(row)):
                lost += 1
            else:
                samples += self._samples(number, row, root)
        report_left_out(root / self.file, len(rows), {f"{IMAGE_TOKEN} mark without an image": lost})
        return samples

    def _samples(self, number: int, row: Row, root: Path) -> list[Sample]:
        names = row.names("image") if "image" in row else ()
        images = tuple(root / self.images / name for name in names)
        name = row.identifier("id") if "id" in row else "row"
        turns = _turns(row)
        marks = [question.count(IMAGE_TOKEN) for question, _ in turns]
        counts = list(accumulate(marks))  # images up to and in each turn
        if len(images) > 1 and not counts[0]:
            raise DataError(f"{row.where}: got no mark {IMAGE_TOKEN} in the first question, expected one or more")
        if counts[-1] != len(images) and (counts[-1], len(images)) != (0, 1):
            raise DataError(f"{row.where}: got {counts[-1]} marks {IMAGE_TOKEN}, expected {len(images)}, one an image")
        if len(images) == 1:
            turns = [(question.replace(IMAGE_TOKEN, "").strip(), answer) for question, answer in turns]
            counts = [1] * len(turns)
        return [
            Sample(
                id=f"{name}#{number}.{turn}",
                images=images[: counts[turn]],
                targets=(answer,),
                prompt=None if self.prompt is None else _written(self.prompt, turns[:turn]) + self.prompt,
                question=question,
                history=tuple(turns[:turn]) if self.prompt is None else None,
                split=split_in_name(Path(self.file).name),
                task="vqa",
                metadata={"answers": (answer,)},
                where=f"{row.where}, turn {turn}",
            )
            for turn, (question, answer) in enumerate(turns)
        ]


def _written(prompt: str, turns: list[tuple[str, str]]) -> str:
    glue = "" if prompt.endswith((" ", "\n")) else " "
    return "".join(f"{prompt.replace(_QUESTION, question)}{glue}{answer}\n" for question, answer in turns)


def _turns(row: Row) -> list[tuple[str, str]]:
    """Pairs of question and answer. A question after the last answer is an error, as is any other order."""
    turns = row.rows("conversations")
    if not turns or len(turns) % 2:
        raise DataError(f"{row.where}: field 'conversations': got {len(turns)} turns, expected question, answer, …")
    texts = []
    for place, turn in enumerate(turns):
        speaker, expected = turn.text("from"), "gpt" if place % 2 else "human"
        if speaker != expected:
            raise DataError(f"{turn.where}: field 'from': got {speaker!r}, expected {expected!r}")
        text = turn.text("value").strip()
        if _QUESTION in text or (expected == "gpt" and (not text or IMAGE_TOKEN in text)):
            raise DataError(
                f"{turn.where}: field 'value': got {text[:60]!r}, expected words without {_QUESTION}, and in an answer "
                f"without {IMAGE_TOKEN}"
            )
        texts.append(text)
    return list(zip(texts[::2], texts[1::2], strict=True))
