"""The processor: pictures and texts in, model inputs out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

import frozenprefix.models.vision.image_processing  # noqa: F401 - registers the image processor that checkpoints name
from frozenprefix.errors import ConfigError, DataError

IMAGE_TOKEN = "<image>"
DEFAULT_PROMPTS = {"caption": "", "vqa": "Question: {question} Answer:"}


class FrozenPrefixProcessor(ProcessorMixin):
    """Image processor, tokenizer with the `<image>` token, and the prompts that the model was trained with.

    Args:
        image_processor: a transformers image processor.
        tokenizer: the LM's tokenizer; `<image>` is added to it, with an id behind the LM's vocabulary.
        prefix_length: placeholders per picture.
        prompts: prompt template per task; "{question}" is filled in.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prefix_length: int = 10,
        prompts: dict[str, str] | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        if tokenizer is None:
            raise ConfigError("FrozenPrefixProcessor needs a tokenizer")
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        self.prefix_length = prefix_length
        self.prompts = {**DEFAULT_PROMPTS, **(prompts or {})}
        self.image_token = IMAGE_TOKEN
        self.image_token_id: int = tokenizer.get_vocab()[IMAGE_TOKEN]
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def prompt_for(
        self, task: str, question: str | None = None, *, template: str | None = None, pictures: int = 1
    ) -> str:
        """The prompt of a task, question filled in; a prompt without `<image>` gets one in front for every picture.

        Args:
            template: the prompt's template, in place of the task's own.

        Raises:
            ConfigError: for a task without a prompt, or a question that the prompt has no place for.
        """
        if template is None and task not in self.prompts:
            raise ConfigError(f"no prompt for task '{task}'; known: {', '.join(sorted(self.prompts))}")
        template = self.prompts[task] if template is None else template
        if ("{question}" in template) != (question is not None):
            got = "no question" if question is None else f"the question {question!r}"
            raise ConfigError(f"prompt of task '{task}' is {template!r}, but got {got}")
        return self.with_image(template.replace("{question}", question or ""), pictures)

    @staticmethod
    def with_image(prompt: str, count: int = 1) -> str:
        return prompt if IMAGE_TOKEN in prompt else IMAGE_TOKEN * count + prompt

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of a prompt, with the tokenizer's own start token; an `<image>` is `prefix_length` placeholders."""
        ids = self.tokenizer(prompt)["input_ids"]
        eos = self.tokenizer.eos_token_id
        if len(ids) > 1 and ids[-1] == eos and not prompt.endswith(self.tokenizer.eos_token):
            ids = ids[:-1]  # tokenizers that close every text would end it before the answer
        expanded: list[int] = []
        for token_id in ids:
            expanded += [token_id] * (self.prefix_length if token_id == self.image_token_id else 1)
        return expanded

    def encode_target(self, prompt: str, target: str, max_tokens: int | None = None) -> list[int]:
        """Token ids of what is learned after `prompt`, closed by the end token.

        A target that follows words starts with a space; one that follows the picture does not. A target over
        `max_tokens` is cut, and still closed.
        """
        if not target.strip():
            raise DataError(f"empty target after prompt {prompt!r}")
        glue = "" if prompt.endswith((IMAGE_TOKEN, " ", "\n")) else " "
        ids = self.tokenizer(glue + target.strip(), add_special_tokens=False)["input_ids"]
        if max_tokens is not None:
            ids = ids[: max_tokens - 1]
        return [*ids, self.tokenizer.eos_token_id]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare pictures and prompts.

        Args:
            images: one picture or a list of them, in reading order over all texts.
            text: one prompt or a list; `<image>` marks where a picture goes, and stands in front when it is missing.
            return_tensors: "pt" pads on the left and gives tensors.

        Returns:
            `input_ids`, `attention_mask` (with text), `pixel_values` (with images).
        """
        data: dict[str, Any] = {}
        if text is None and images is not None:
            raise DataError("text: got None with images; give a prompt, or '<image>' for none")
        if text is not None:
            prompts = [text] if isinstance(text, str) else list(text)
            prompts = [self.with_image(prompt) if images is not None else prompt for prompt in prompts]
            encoded = [self.encode_prompt(prompt) for prompt in prompts]
            data |= self.tokenizer.pad(
                {"input_ids": encoded}, padding=len(encoded) > 1, padding_side="left", return_tensors=return_tensors
            )
        if images is not None:
            data |= self.image_processor(images, return_tensors=return_tensors)
        return BatchFeature(data)

    def decode(self, ids: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(ids, **{"skip_special_tokens": True, **kwargs}).strip()

    def batch_decode(self, ids: Any, **kwargs: Any) -> list[str]:
        return [self.decode(row, **kwargs) for row in ids]
