"""The processor: images and texts in, model inputs out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

import frozenprefix.models.vision.image_processing  # noqa: F401 - registers the image processor that checkpoints name
from frozenprefix.errors import ConfigError, DataError, did_you_mean, shorten
from frozenprefix.models.chat_template import image_template
from frozenprefix.models.pretrained import reading
from frozenprefix.models.standalone import name_processor_code
from frozenprefix.utils import replace_surrogates
from frozenprefix.utils.images import to_images

IMAGE_TOKEN = "<image>"
# Stands inside the special tokens of a user's text, so that they are read as text. It does not occur in ordinary text.
_JOINER = "\u2060"
_OF_GENERATE = ("streamer", "stopping_criteria", "logits_processor", "num_beams", "do_sample", "temperature", "top_p")
DEFAULT_PROMPTS = {"caption": "", "vqa": "Question: {question} Answer:", "classification": "A photo of a"}


class FrozenPrefixProcessor(ProcessorMixin):
    """Image processor, tokenizer with the `<image>` token, and the prompts that the model was trained with.

    Args:
        image_processor: a transformers image processor.
        tokenizer: the LM's tokenizer; `<image>` is added to it, with an id beyond the LM's vocabulary.
        prefix_length: placeholders per image.
        prompts: prompt template per task; "{question}" is filled in.

    Example:
        >>> inputs = processor(image, "<image>a red", return_tensors="pt")
        >>> inputs["input_ids"].shape, inputs["pixel_values"].shape
        (torch.Size([1, 5]), torch.Size([1, 3, 32, 32]))
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
        self._special_tokens = _special_tokens(tokenizer)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """Load a checkpoint's processor, as transformers does; code that the checkpoint names is never run."""
        options["trust_remote_code"] = False
        with reading(str(pretrained_model_name_or_path), "processor", "a processor of this package"):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **options)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Write tokenizer, image processor and prompts, as transformers does, beside a checkpoint's code if any."""
        written = super().save_pretrained(save_directory, *args, **kwargs)
        name_processor_code(Path(save_directory))
        return written

    def prompt_for(
        self, task: str, question: str | None = None, *, template: str | None = None, images: int = 1
    ) -> str:
        """The prompt of a task, with the question filled in; without an `<image>` it gets one in front per image.

        Args:
            template: the prompt's template, instead of the task's own.

        Raises:
            ConfigError: for a task without a prompt, or a question that the prompt has no place for.

        Example:
            >>> processor.prompt_for("vqa", "what color is this?")
            '<image>Question: what color is this? Answer:'
        """
        if template is None and task not in self.prompts:
            raise ConfigError(f"no prompt for task '{task}'; known: {', '.join(sorted(self.prompts))}")
        template = self.prompts[task] if template is None else template
        if ("{question}" in template) != (question is not None):
            got = "no question" if question is None else f"the question {question!r}"
            raise ConfigError(f"prompt of task '{task}' is {template!r}, but got {got}")
        return self.with_image(template.replace("{question}", self.escape(question or "")), images)

    def chat_prompt(self, history: Sequence[tuple[str, str]], question: str, *, images: int = 1) -> str:
        """A conversation up to the reply to `question`, formatted by `apply_chat_template`.

        Args:
            history: earlier questions and their replies.
            images: number of images. The questions have an `<image>` for each of them; otherwise the images are in
                front of the first question, and an `<image>` in a question is text.

        Example:
            >>> processor.chat_prompt([("what shape is this?", "a cross")], "what color is it?")
            '<image>Question: what shape is this? Answer: a cross\\nQuestion: what color is it? Answer:'
        """
        questions = [text for text, _ in history] + [question]
        marked = sum(text.count(IMAGE_TOKEN) for text in questions) == images
        questions = [self.escape(text, keep_images=marked) for text in questions]
        if not any(IMAGE_TOKEN in text for text in questions):
            questions[0] = IMAGE_TOKEN * images + questions[0]
        messages = [{"role": "user", "content": questions[0]}]
        for (_, reply), text in zip(history, questions[1:], strict=True):
            messages += [{"role": "assistant", "content": self.escape(reply)}, {"role": "user", "content": text}]
        return str(self.apply_chat_template(messages, add_generation_prompt=True))

    @staticmethod
    def with_image(prompt: str, count: int = 1) -> str:
        return prompt if IMAGE_TOKEN in prompt else IMAGE_TOKEN * count + prompt

    def apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Messages as text or model inputs, as in transformers; works with templates written for text alone.

        Args:
            conversation: `{"role", "content"}` messages or a list of such lists. The content is a text with `<image>`
                marks, or parts `{"type": "image", …}` and `{"type": "text", "text": …}`.
            chat_template: a template, or the name of one of several. The processor's own, else the tokenizer's, else
                the prompt of task "vqa", one after the other, when not given.
            args, kwargs: of transformers' `apply_chat_template`: `add_generation_prompt`, `tokenize`, `return_dict`, …
        """
        known = self.chat_template or self.tokenizer.chat_template
        template = image_template(chat_template, known, self.prompts["vqa"], IMAGE_TOKEN)
        return super().apply_chat_template(conversation, template, *args, **kwargs)

    def escape(self, text: str, *, keep_images: bool = False) -> str:
        """A user's text in which special tokens are text: `encode_prompt` does not read `</s>` in it as an end token.

        Args:
            keep_images: leave `<image>` a mark for an image.

        Example:
            >>> ids = processor.encode_prompt(processor.escape("a <image> b"))
            >>> processor.image_token_id in ids
            False
        """
        for token in self._special_tokens:
            if token in text and not (keep_images and token == IMAGE_TOKEN):
                text = text.replace(token, token[0] + _JOINER + token[1:])
        return text

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text in which escaped special tokens are text."""
        text = replace_surrogates(text)
        if _JOINER not in text:
            return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        ids = list(self.tokenizer("", add_special_tokens=True)["input_ids"]) if add_special_tokens else []
        ids = ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids
        tokens = self._special_tokens
        for part in re.split(f"({'|'.join(map(re.escape, tokens))})", text):
            if part in tokens:
                ids.append(self.tokenizer.convert_tokens_to_ids(part))
            elif part:
                ids += self._encode_plain(part.replace(_JOINER, ""))
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        """Token ids of a text without special tokens, whatever is written in it."""
        text = replace_surrogates(text)
        split = any(token in text for token in self._special_tokens)
        options = {"split_special_tokens": True} if split else {}
        return self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]

    def encode_prompt(self, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, with the tokenizer's start token if it adds one; an `<image>` is `prefix_length` ids.

        A prompt that begins with the start token, as some chat templates write it, gets no second one.

        Example:
            >>> processor.encode_prompt("<image>") == [processor.image_token_id] * 2
            True
        """
        start = self.tokenizer.bos_token
        add_special_tokens = add_special_tokens and not (start and prompt.startswith(start))
        ids = self._encode(prompt, add_special_tokens=add_special_tokens)
        eos = self.tokenizer.eos_token_id
        if len(ids) > 1 and ids[-1] == eos and not prompt.endswith(self.tokenizer.eos_token):
            ids = ids[:-1]  # tokenizers that close every text would end it before the answer
        expanded: list[int] = []
        for token_id in ids:
            expanded += [token_id] * (self.prefix_length if token_id == self.image_token_id else 1)
        return expanded

    def encode_target(self, prompt: str, target: str, max_tokens: int | None = None) -> list[int]:
        """Token ids of the target that is learned after `prompt`, closed by the end token.

        A target that follows words starts with a space; one that follows the image does not. A target longer than
        `max_tokens` is cut, and still closed. Special tokens in it, such as `</s>`, are read as text.

        Example:
            >>> processor.tokenizer.decode(processor.encode_target("Answer:", "red"))
            ' red</s>'
        """
        if not target.strip():
            raise DataError(f"empty target after prompt {prompt!r}")
        ids = self._encode_plain(glued(prompt, target))
        if max_tokens is not None:
            ids = ids[: max_tokens - 1]
        return [*ids, self.tokenizer.eos_token_id]

    def encode_targets(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        """`encode_target` for many (prompt, target) pairs, with one call of the tokenizer: several times as fast.

        Example:
            >>> processor.encode_targets([("Answer:", "red")]) == [processor.encode_target("Answer:", "red")]
            True
        """
        texts = [replace_surrogates(glued(prompt, target)) for prompt, target in pairs]
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        for place, text in enumerate(texts):
            if any(token in text for token in self._special_tokens):
                encoded[place] = self._encode_plain(text)
        return [[*ids, self.tokenizer.eos_token_id] for ids in encoded]

    def prepare_texts(self, texts: Sequence[str], max_tokens: int | None = None) -> dict[str, Tensor]:
        """Inputs of the model's `encode_text`: texts without images, closed by the end token, padded on the right.

        Args:
            max_tokens: longer texts are cut, and still closed.

        Returns:
            `input_ids` and `attention_mask`, int64[T, L].
        """
        start = self.encode_prompt("")
        encoded = [[*start, *self.encode_target(IMAGE_TOKEN, text, max_tokens)] for text in texts]
        padded = self.tokenizer.pad({"input_ids": encoded}, padding_side="right", return_tensors="pt")
        return {name: padded[name] for name in ("input_ids", "attention_mask")}

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        padding: bool | str | None = None,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare images and prompts.

        Args:
            images: one image or a list of them, in reading order over all texts; or a list of lists, one per text; as
                files, PIL images, arrays or tensors, see `frozenprefix.utils.images.to_image`.
            text: one prompt or a list; `<image>` marks the place of an image, which is in front when it is missing.
            return_tensors: "pt" pads on the left and gives tensors.
            add_special_tokens: put the tokenizer's start token in front, where the prompt does not begin with it.
            padding: as in transformers; several prompts are padded on the left to the longest when not given.
            max_length: for `padding="max_length"`.

        Returns:
            `input_ids`, `attention_mask` (with text), `pixel_values` (with images).

        Raises:
            ConfigError: for an argument that has no effect here, truncation among them, which would cut images.
            DataError: for images without a text, and for lists of images that do not fit the marks of their texts.
        """
        _check_arguments(kwargs, padding, max_length)
        data: dict[str, Any] = {}
        if text is None and images is not None:
            raise DataError("text: got None with images; give a prompt, or '<image>' for none")
        if text is not None:
            prompts = [text] if isinstance(text, str) else list(text)
            if images is not None:
                prompts = self._with_images(prompts, images)
            encoded = [self.encode_prompt(prompt, add_special_tokens=add_special_tokens) for prompt in prompts]
            data |= self.tokenizer.pad(
                {"input_ids": encoded},
                padding=len(encoded) > 1 if padding is None else padding,
                max_length=max_length,
                padding_side="left",
                return_tensors=return_tensors,
            )
        if images is not None:
            data |= self.image_processor(to_images(images), return_tensors=return_tensors)
        return BatchFeature(data)

    def _with_images(self, prompts: list[str], images: Any) -> list[str]:
        """Put marks in front of prompts without any; lists of images, one per prompt, must fit the marks."""
        if not (isinstance(images, (list, tuple)) and images and all(isinstance(own, (list, tuple)) for own in images)):
            return [self.with_image(prompt) for prompt in prompts]
        if len(images) != len(prompts):
            raise DataError(f"images: got {len(images)} lists for {len(prompts)} texts, expected one list per text")
        prompts = [self.with_image(prompt, len(own)) for prompt, own in zip(prompts, images, strict=True)]
        for number, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
            if prompt.count(IMAGE_TOKEN) != len(own):
                raise DataError(
                    f"images: text {number} has {prompt.count(IMAGE_TOKEN)} {IMAGE_TOKEN} marks and {len(own)} images; "
                    "give one image for every mark"
                )
        return prompts

    def decode(self, ids: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(ids, **{"skip_special_tokens": True, **kwargs}).strip()

    def batch_decode(self, ids: Any, **kwargs: Any) -> list[str]:
        return [self.decode(row, **kwargs) for row in ids]


def _check_arguments(options: dict[str, Any], padding: bool | str | None, max_length: int | None) -> None:
    """Refuse arguments of transformers' processors that have no effect here, and unknown ones, by name."""
    if padding not in (None, True, False, "longest", "max_length", "do_not_pad"):
        raise ConfigError(f"padding: got {padding!r}, expected True, False, 'longest', 'max_length' or 'do_not_pad'")
    if (padding == "max_length") != (max_length is not None):
        raise ConfigError("padding: 'max_length' and an argument max_length go together; give both or neither")
    neutral = {"truncation": (None, False, "do_not_truncate"), "padding_side": (None, "left")}
    known = ("images", "text", "return_tensors", "add_special_tokens", "padding", "max_length", *neutral)
    for name, value in options.items():
        if name == "truncation" and value not in neutral[name]:
            raise ConfigError("truncation: would cut images out of a prompt; shorten the text")
        if value not in (None, {}, *neutral.get(name, ())):
            fix = "a pipeline passes it to `generate` in generate_kwargs" if name in _OF_GENERATE else "remove it"
            hint = "" if name in _OF_GENERATE else did_you_mean(name, known)
            raise ConfigError(f"processor: {name}={shorten(value)} has no effect here{hint}; {fix}")


def glued(prompt: str, target: str) -> str:
    """The target as it follows the prompt: with a space in front of it, except after an image or white space.

    Example:
        >>> glued("Answer:", "red"), glued("<image>", "a red circle")
        (' red', 'a red circle')
    """
    return ("" if prompt.endswith((IMAGE_TOKEN, " ", "\n")) else " ") + target.strip()


def escape_any(text: str) -> str:
    """As `FrozenPrefixProcessor.escape`, for all texts in angle or square brackets, without knowing the tokenizer.

    Example:
        >>> processor.encode_prompt(escape_any("a </s>")) == processor.encode_prompt(processor.escape("a </s>"))
        True
    """
    return re.sub(r"[<\[](?=[^<>\[\]\s]+[>\]])", lambda bracket: bracket[0] + _JOINER, text)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that the tokenizer reads as one special token, longest first."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
