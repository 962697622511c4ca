"""Conversations about images: several turns, images at any of them, the history kept in the LM's cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteriaList

from frozenprefix.data.image_encoder import ImageInput
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.inference.captioner import Captioner
from frozenprefix.inference.generate_options import CAPTIONER_REFUSES, check_generate
from frozenprefix.inference.streaming import stream_pieces
from frozenprefix.kernels.compat import CACHE, is_recurrent
from frozenprefix.models.language_model import end_tokens, padding_token
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.processing import IMAGE_TOKEN, FrozenPrefixProcessor

Images = Sequence[ImageInput] | Tensor
_ONE_CACHE = "not an option of a dialog, which continues one text in one cache"
#: Options of `generate` that a dialog does not take.
DIALOG_REFUSES = {
    **dict.fromkeys(CAPTIONER_REFUSES, _ONE_CACHE),
    **dict.fromkeys(("past_key_values", "cache", "use_cache"), _ONE_CACHE),
}


@dataclass(frozen=True)
class _Turn:
    """One turn as the LM reads it: all messages so far as token ids, all images as prefix embeddings."""

    message: dict[str, str]
    ids: list[int]
    prefix_embeds: Tensor | None  # float[images, P, D_lm]
    options: dict[str, Any]


class Dialog:
    """A conversation with a trained model.

    Messages are formatted by the chat template of the LM's tokenizer (such as ChatML) or, without one, by the prompt
    that questions were trained with. A turn feeds only the tokens that the LM's key-value cache does not hold yet; the
    result is the same as for the whole history at once.

    Args:
        model, processor: as saved together in a checkpoint.
        system: first message, where the template takes one.

    Example:
        >>> dialog = Dialog(model, processor)
        >>> reply = dialog.ask("what is it?", [image], max_new_tokens=3)
        >>> [message["role"] for message in dialog.messages]
        ['user', 'assistant']
    """

    def __init__(
        self,
        model: FrozenPrefixForConditionalGeneration,
        processor: FrozenPrefixProcessor,
        *,
        system: str | None = None,
    ):
        if not model.lm.keeps_history:
            raise ConfigError("a dialog continues one text, so it needs a decoder-only language model")
        self.model = model.eval()
        self.processor = processor
        self.system = system
        self._captioner = Captioner(model, processor)
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        device: str | None = None,
        system: str | None = None,
        language_model: str | Path | None = None,
        precision: str = "auto",
    ) -> Dialog:
        """Load a checkpoint; `device`, `language_model` and `precision` as of `Captioner.from_pretrained`."""
        captioner = Captioner.from_pretrained(
            checkpoint, device=device, language_model=language_model, precision=precision
        )
        return cls(captioner.model, captioner.processor, system=system)

    def reset(self) -> None:
        """Forget all messages and images, but not the system message."""
        self.messages: list[dict[str, str]] = [{"role": "system", "content": self.system}] if self.system else []
        self._ids: list[int] = []  # of the whole history; the cache holds all but the last few
        self._prefix_embeds: Tensor | None = None
        self._cache: DynamicCache | None = None

    @property
    def num_tokens(self) -> int:
        """Length of the history in tokens; an image counts as `prefix_length` tokens."""
        return len(self._ids)

    @property
    def context(self) -> int | None:
        """Largest number of tokens that the LM can read, history and reply together; None without a limit."""
        return self.model.lm.max_positions

    def ask(self, text: str, images: Images = (), *, max_new_tokens: int = 64, **generate: Any) -> str:
        """Send a message and return the whole reply; arguments and errors as in `stream`."""
        return self._reply(self._begin(text, images, {"max_new_tokens": max_new_tokens, **generate}))

    def stream(self, text: str, images: Images = (), *, max_new_tokens: int = 64, **generate: Any) -> Iterator[str]:
        """Send a message and return the reply word by word.

        Args:
            text: the message; every `<image>` in it is one of `images`. Without marks the images come first.
            images: files, PIL images, or image features float[n, N, D_enc] of this turn; earlier ones stay in the
                history.
            generate: further options of transformers' `generate`, such as `do_sample=True, top_p=0.9`. Greedy without.

        Returns:
            An iterator over pieces of text. Closing it ends the reply; the text so far stays in the history.

        Raises:
            DataError: for marks without images, an image that cannot be read, or more tokens than the LM can read;
                the history stays as it was.
            ConfigError: for options that need several rows, such as `num_beams`.
        """
        turn = self._begin(text, images, {"max_new_tokens": max_new_tokens, **generate})
        return stream_pieces(self.processor.tokenizer, lambda streaming: self._reply(turn, streaming))

    def _begin(self, text: str, images: Images, options: dict[str, Any]) -> _Turn:
        beams = {"num_beams": _ONE_CACHE} if options.get("num_beams", 1) != 1 else {}
        check_generate(options, DIALOG_REFUSES | beams)
        marks = text.count(IMAGE_TOKEN)
        if marks not in (0, len(images)):
            raise DataError(
                f"message: got {marks} {IMAGE_TOKEN} marks and {len(images)} images; give one image for every "
                "mark, or leave the marks out to put the images first"
            )
        message = {"role": "user", "content": text if marks else IMAGE_TOKEN * len(images) + text}
        ids = self._encode([*self.messages, message])
        self._check_room(len(ids), options["max_new_tokens"])
        return _Turn(message, ids, self._with_images(images), options)

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        return self.processor.encode_prompt(self.processor.apply_chat_template(messages, add_generation_prompt=True))

    def _check_room(self, tokens: int, new: int) -> None:
        if self.context is None or tokens + new <= self.context:
            return
        left = self.context - tokens
        lower = f", or set max_new_tokens to {left} at most" if left > 0 else ""
        raise DataError(
            f"dialog: {tokens} tokens and a reply of up to {new} are more than the LM's context of {self.context}; "
            f"start again with reset(){lower}"
        )

    def _with_images(self, images: Images) -> Tensor | None:
        if not len(images):
            return self._prefix_embeds
        features = self._captioner.encoder(images)
        with torch.no_grad():
            prefix_embeds = self.model.map_features(features.to(self.model.device))
        return prefix_embeds if self._prefix_embeds is None else torch.cat([self._prefix_embeds, prefix_embeds])

    @torch.no_grad()
    def _reply(self, turn: _Turn, streaming: dict[str, Any] | None = None) -> str:
        """Let the LM continue, and put question and reply into the history."""
        language_model = cast(Any, self.model.language_model)
        ids = torch.tensor([turn.ids], device=self.model.device)
        inputs_embeds, images = self.model.fuse(ids, turn.prefix_embeds)
        cache = self._take_cache(turn.ids)
        known = cache.get_seq_length() if cache is not None else 0
        if images is not None:
            images = replace(images, prefix_index=images.prefix_index[:, known:], image=images.image[:, known:])
        options = {
            "do_sample": False,
            "eos_token_id": end_tokens(self.model, self.processor.tokenizer),
            "pad_token_id": padding_token(self.model, self.processor.tokenizer),
            **turn.options,
        }
        if streaming is not None:
            criteria = [*(options.get("stopping_criteria") or []), *streaming["stopping_criteria"]]
            options |= {**streaming, "stopping_criteria": StoppingCriteriaList(criteria)}
        with self.model.fusion.seeing(images):
            new = language_model.generate(
                None,
                inputs_embeds=inputs_embeds,  # the whole history, of which transformers takes what the cache lacks
                attention_mask=torch.ones_like(ids),
                **{CACHE: cache},
                **options,
            )[0].tolist()
        reply = self.processor.decode(new)
        # spelled out by the LM, the mark would ask for an image in the next turn
        reply = reply.replace(IMAGE_TOKEN, IMAGE_TOKEN.replace("<", "< "))
        self._cache, self._ids, self._prefix_embeds = cache, turn.ids + new, turn.prefix_embeds
        self.messages += [turn.message, {"role": "assistant", "content": reply}]
        return reply

    def _take_cache(self, ids: list[int]) -> DynamicCache | None:
        """Take the cache, cropped to the tokens that `ids` share with the history; a finished reply puts it back.

        The template may write a reply differently from how the LM wrote it; from there on the tokens are read again. An
        LM with recurrent layers cannot go back, and reads the whole history again.
        """
        if is_recurrent(self.model.language_model):
            return None
        cache, self._cache = self._cache, None
        held = 0 if cache is None else cache.get_seq_length()
        shared = 0
        # at least one token is left to read
        for old, new in zip(self._ids[:held], ids[:-1], strict=False):
            if old != new:
                break
            shared += 1
        if cache is None or shared == 0:
            return DynamicCache()
        if shared < held:
            cache.crop(shared - held)
        return cache
