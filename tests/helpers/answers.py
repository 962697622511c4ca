"""Models that give known answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from frozenprefix.evaluation.tasks.runs import Asked


def saying(answer: str | Callable[[Asked, str], str]):
    """A stand-in for `runs.predict`: one text for all prompts, or a function of what is asked and of the prompt."""
    text_of = (lambda asked, prompt: answer) if isinstance(answer, str) else answer

    def predict(captioner, batch: Sequence[Asked], *_) -> list[list[str]]:
        return [[text_of(asked, prompt) for prompt in asked.prompts] for asked in batch]

    return predict


def ids_of(batch: Sequence[Asked]) -> list[tuple[str, str]]:
    """(run, sample id) of all who ask in a batch."""
    return [asker for asked in batch for askers in asked.askers.values() for asker in askers]
