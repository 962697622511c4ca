"""Options of retrieval: the recipe's section `data.retrieval`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import ConfigDict, Field

from frozenprefix.errors import Problem
from frozenprefix.models.processing import IMAGE_TOKEN, FrozenPrefixProcessor, escape_any
from frozenprefix.models.section import Section

CAPTIONS_MARK = "{captions}"
_PROMPT_FIELDS = ("captions", "template")


class RetrievalOptions(Section):
    """Options of retrieval: what for, how captions are chosen, and their place in the prompt.

    A ridge regression in closed form predicts the n-grams of an image's captions from its features: a weighted mean of
    all training captions, with weights as of `RidgeWeights`. Captions agree with it as CIDEr measures it. With `images`
    the captions of that many nearest images are taken instead, each with the same weight.

    Example:
        >>> RetrievalOptions(template="Like: {captions}. ").prompt(["a dog", "a cat"], "Caption:")
        'Like: a dog\\na cat. <image>Caption:'
    """

    model_config = ConfigDict(frozen=True)

    use: Literal["prompt", "rerank", "both"] = Field(
        "prompt", description="prompt: captions stand in the prompt; rerank: they choose among the beams; both"
    )
    ridge: float = Field(0.5, gt=0, description="regularisation of the regression that weighs the training images")
    images: int | None = Field(
        None, ge=1, description="look at this number of nearest training images, in place of a regression over all"
    )
    captions: int = Field(4, ge=1, description="captions in the prompt, one a line, at most one of each image")
    template: str = Field(
        f"Similar images:\n{CAPTIONS_MARK}\n",
        description="text in front of the task's own prompt; the image follows it, unless it has an <image>",
    )

    @property
    def prompts(self) -> bool:
        """Whether captions stand in the prompt."""
        return self.use != "rerank"

    @property
    def reranks(self) -> bool:
        """Whether captions choose among beams."""
        return self.use != "prompt"

    def weighing(self) -> dict[str, Any]:
        """The option that says how training images are weighed."""
        return self.model_dump(include={"ridge" if self.images is None else "images"})

    def used(self) -> dict[str, Any]:
        """The options that have an effect."""
        return self.model_dump(exclude=None if self.prompts else {*_PROMPT_FIELDS})

    def problems(self) -> list[Problem]:
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        if self.images is not None and self.ridge != defaults["ridge"]:
            return [Problem("has no effect with images, whose weights are equal; remove one of them", ("ridge",))]
        if not self.prompts:
            # a resolved recipe has all keys
            unused = [name for name in _PROMPT_FIELDS if getattr(self, name) != defaults[name]]
            return [Problem("has no effect with use 'rerank'; remove it", (name,)) for name in unused]
        problems = []
        if self.images is not None and self.captions > self.images:
            text = f"got {self.captions}, expected at most one for each of the {self.images} images"
            problems.append(Problem(text, ("captions", "images")))
        marks = {CAPTIONS_MARK: (1, 1), IMAGE_TOKEN: (0, 1), "{question}": (0, 0)}
        if any(not low <= self.template.count(mark) <= high for mark, (low, high) in marks.items()):
            text = f"got {self.template!r}, expected {CAPTIONS_MARK} once, and <image> at most once"
            problems.append(Problem(text, ("template",)))
        return problems

    def prompt(self, captions: Sequence[str], prompt: str) -> str:
        """A prompt with captions in front of it, and one `<image>`."""
        front = self.template.replace(CAPTIONS_MARK, "\n".join(map(escape_any, captions)))
        if IMAGE_TOKEN in front:
            return front + prompt.replace(IMAGE_TOKEN, "")
        return front + FrozenPrefixProcessor.with_image(prompt)
