"""Checkpoints as a model of VLMEvalKit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from frozenprefix.errors import DataError, shorten
from frozenprefix.interop.requests import Answerer, Request


class FrozenPrefixVLM:
    """A model with the methods that VLMEvalKit calls, which itself is not needed here.

    It is made known to VLMEvalKit before `run.py`'s `main` is called:

        from functools import partial
        from vlmeval.config import supported_VLM
        supported_VLM["mine"] = partial(FrozenPrefixVLM, "runs/mine/best", prompt="caption")

    Args:
        checkpoint: a folder or Hub id.
        prompt: as of `Answerer`.
        max_new_tokens: of every answer.
        generate: further options of `Request`: num_beams, do_sample, …
        options: of `Answerer.from_pretrained`: device, precision, language_model.

    Example:
        >>> model = FrozenPrefixVLM(checkpoint, max_new_tokens=3)
        >>> message = [{"type": "image", "value": str(image_path)}, {"type": "text", "value": "what color?"}]
        >>> isinstance(model.generate(message, dataset="MMBench"), str)
        True
    """

    is_api = False
    INTERLEAVE = True
    allowed_types = ("text", "image")

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        prompt: str = "vqa",
        max_new_tokens: int = 64,
        generate: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        self.answerer = Answerer.from_pretrained(checkpoint, prompt=prompt, **options)
        self.generate_options = {"max_new_tokens": max_new_tokens, **(generate or {})}

    def generate(self, message: Any, dataset: str | None = None) -> str:
        """Answer a message: a text, or parts `{"type": "text" or "image", "value": …}`; one alone or a list."""
        return self.generate_inner(message, dataset)

    def generate_inner(self, message: Any, dataset: str | None = None) -> str:
        """As `generate`, the name by which VLMEvalKit's base class calls its models."""
        (text,) = self.answerer([Request(to_messages(message), self.generate_options)])
        return text

    def use_custom_prompt(self, dataset: str) -> bool:
        """False: the data sets' own prompts are used."""
        return False

    def set_dump_image(self, dump_image: Callable[..., Any]) -> None:
        """Do nothing: prompts name image files."""


def to_messages(message: Any) -> list[dict[str, Any]]:
    """A message of VLMEvalKit as a conversation of one turn.

    Raises:
        DataError: for a part that is neither text nor image.

    Example:
        >>> to_messages([{"type": "image", "value": "a.jpg"}, "what is it?"])[0]["content"]
        [{'type': 'image', 'image': 'a.jpg'}, {'type': 'text', 'text': 'what is it?'}]
    """
    parts = message if isinstance(message, Sequence) and not isinstance(message, str) else [message]
    content = []
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "value": part}
        if not isinstance(part, Mapping) or part.get("type") not in ("text", "image") or "value" not in part:
            raise DataError(
                f"message: got {shorten(part, 80)}, expected a text, or type 'text' or 'image' with a value"
            )
        kind = part["type"]
        content.append({"type": kind, kind: part["value"]})
    return [{"role": "user", "content": content}]
