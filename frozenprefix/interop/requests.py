"""Chat messages of evaluation tools as prompts and images of a checkpoint, and their generation options."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from frozenprefix.errors import ConfigError, DataError, did_you_mean
from frozenprefix.inference import Captioner
from frozenprefix.inference.captioner import batched
from frozenprefix.models.processing import IMAGE_TOKEN, FrozenPrefixProcessor

logger = logging.getLogger(__name__)

PromptKind = Literal["vqa", "caption", "chat"]
_KINDS = ("vqa", "caption", "chat")
#: Options that tasks give and that change the text here; the others are named in the log once.
_OPTIONS = ("max_new_tokens", "num_beams", "do_sample", "temperature", "top_p", "top_k", "length_penalty")
_SAMPLING = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Request:
    """One text to be generated.

    Attributes:
        messages: `{"role", "content"}`, whose content is a text or a list of parts `{"type": "text", "text": …}` and
            `{"type": "image", "image": …}`, with a path, a PIL image or an array.
        options: of `generate`, with the names of tasks of lmms-eval: also `until`, one or several texts to stop at.

    Example:
        >>> Request([{"role": "user", "content": "what color is it?"}]).options
        {}
    """

    messages: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)


class Answerer:
    """Answers requests in batches.

    Args:
        captioner: the model.
        prompt: what becomes of the text of a request. "vqa": the checkpoint's own prompt for questions, with the text
            of the last user's turn as the question. "caption": the checkpoint's own prompt for captions; the text is
            left out. "chat": the checkpoint's chat template, for models that were trained on conversations.

    Example:
        >>> parts = [{"type": "image", "image": image}, {"type": "text", "text": "color?"}]
        >>> message = {"role": "user", "content": parts}
        >>> answerer = Answerer(captioner)
        >>> answerer.prompt([message])[0]
        '<image>Question: color? Answer:'
        >>> len(answerer([Request([message], {"max_new_tokens": 2})]))
        1
    """

    def __init__(self, captioner: Captioner, prompt: str = "vqa"):
        if prompt not in _KINDS:
            raise ConfigError(f"prompt: got {prompt!r}, expected {' or '.join(_KINDS)}{did_you_mean(prompt, _KINDS)}")
        if captioner.retriever is not None:
            raise ConfigError(
                "checkpoint: it was trained with data.retrieval, whose prompts need image files; use evaluate"
            )
        self.captioner, self.kind = captioner, prompt
        self._named: set[str] = set()

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        prompt: str = "vqa",
        device: str | None = None,
        batch_size: int = 8,
        precision: str = "auto",
        language_model: str | None = None,
    ) -> Answerer:
        """Load a checkpoint; arguments as of `Captioner.from_pretrained`."""
        if prompt not in _KINDS:  # before the model is loaded
            raise ConfigError(f"prompt: got {prompt!r}, expected {' or '.join(_KINDS)}{did_you_mean(prompt, _KINDS)}")
        options: dict[str, Any] = {"batch_size": batch_size, "precision": precision, "language_model": language_model}
        return cls(Captioner.from_pretrained(checkpoint, device=device, **options), prompt)

    def __call__(self, requests: Sequence[Request]) -> list[str]:
        """The texts, in the order of the requests; those with the same options are generated together."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(dict(request.options), sort_keys=True, default=str), []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            options, stops = self._options(requests[numbers[0]].options)
            for batch in batched(numbers, self.captioner.batch_size):
                prompts, images = [], []
                for number in batch:
                    prompt, shown = self.prompt(requests[number].messages)
                    prompts.append(prompt)
                    images += shown
                for number, text in zip(batch, self._generate(prompts, images, options), strict=True):
                    texts[number] = _cut(text, stops)
        return texts

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Any]]:
        """The prompt of a conversation, with an `<image>` mark for each image, and its images in this order.

        Raises:
            DataError: for a part that is neither text nor image.
        """
        processor: FrozenPrefixProcessor = self.captioner.processor
        turns = [(str(message.get("role")), _parts(message.get("content"))) for message in messages]
        images = [value for _, parts in turns for kind, value in parts if kind == "image"]
        if self.kind == "chat":
            written = [
                {
                    "role": role,
                    "content": "".join(
                        IMAGE_TOKEN if kind == "image" else processor.escape(value) for kind, value in parts
                    ),
                }
                for role, parts in turns
            ]
            return str(processor.apply_chat_template(written, add_generation_prompt=True)), images
        if self.kind == "caption":
            return processor.prompt_for("caption", images=len(images)), images
        asked = [parts for role, parts in turns if role == "user"]
        text = "\n".join(value.strip() for kind, value in (asked[-1] if asked else []) if kind == "text")
        return processor.prompt_for("vqa", text, images=len(images)), images

    def _generate(self, prompts: list[str], images: list[Any], options: dict[str, Any]) -> list[str]:
        processor, positions = self.captioner.processor, self.captioner.model.lm.learned_positions
        if positions is not None:  # tasks ask for more than such models can write
            longest = max(len(processor.encode_prompt(prompt)) for prompt in prompts)
            options = {**options, "max_new_tokens": max(1, min(options["max_new_tokens"], positions - longest + 1))}
        return [one.text for one in self.captioner.generate(prompts, images or None, **options)]

    def _options(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Options of `generate`, and the texts to stop at."""
        stops = given.get("until") or []
        options = {name: given[name] for name in _OPTIONS if given.get(name) is not None}
        options.setdefault("max_new_tokens", 64)
        if not options.get("temperature", 1.0) or not options.get("do_sample", False):
            options = {name: value for name, value in options.items() if name not in _SAMPLING} | {"do_sample": False}
        without = sorted(given.keys() - {*_OPTIONS, "until"} - self._named)
        if without:
            self._named.update(without)
            logger.warning("generation options without effect here: %s", ", ".join(without))
        return options, [stops] if isinstance(stops, str) else [str(stop) for stop in stops]


def _parts(content: Any) -> list[tuple[str, Any]]:
    """(kind, value) of the parts of a message."""
    if isinstance(content, str):
        return [("text", content)]
    parts = []
    for part in content or []:
        kind = part.get("type") if isinstance(part, Mapping) else None
        value = part.get("text" if kind == "text" else "image") if kind in ("text", "image") else None
        if value is None or (kind == "text" and not isinstance(value, str)):
            raise DataError(f"message: got a part of type {kind!r}, expected text or image, with its value")
        parts.append((str(kind), value))
    return parts


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of `stops`."""
    ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
