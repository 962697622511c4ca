"""Texts word by word: what a model generates in another thread, as pieces of text."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList, TextIteratorStreamer

from frozenprefix.data.image_encoder import ImageInput
from frozenprefix.errors import DataError
from frozenprefix.inference.captioner import Captioner
from frozenprefix.inference.generate_options import CAPTIONER_REFUSES, check_generate
from frozenprefix.models.language_model import end_tokens, padding_token
from frozenprefix.models.processing import IMAGE_TOKEN

_ONE_TEXT = "a stream is one text, without beams"


def stream_pieces(tokenizer: Any, generate: Callable[[dict[str, Any]], Any]) -> Iterator[str]:
    """Run `generate` in a thread, and yield the text that it writes, piece by piece, without blanks in front.

    Closing the iterator ends the generation after its present token. An error of `generate` is raised here.

    Args:
        generate: takes the options `streamer` and `stopping_criteria`, for transformers' `generate`.

    Example:
        >>> def write(options):
        ...     for token in processor.tokenizer("a red circle", add_special_tokens=False)["input_ids"]:
        ...         options["streamer"].put(torch.tensor([token]))
        >>> "".join(stream_pieces(processor.tokenizer, write)).strip()
        'a red circle'
    """
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    stopped = threading.Event()
    options = {"streamer": streamer, "stopping_criteria": StoppingCriteriaList([_Until(stopped)])}
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(generate, options)
        text.add_done_callback(lambda _: streamer.end())  # also when it failed
        try:
            begun = False
            for piece in streamer:
                piece = piece if begun else piece.lstrip()
                begun = begun or bool(piece)
                if piece:
                    yield piece
        finally:
            stopped.set()
    text.result()


def stream_text(
    captioner: Captioner,
    prompt: str,
    images: Sequence[ImageInput] | Tensor,
    *,
    max_new_tokens: int = 30,
    **generate: Any,
) -> Iterator[str]:
    """Continue one prompt word by word, greedily unless `generate` says otherwise.

    Args:
        prompt: with an `<image>` for every image.
        images: files, PIL images, or image features float[n, N, D_enc].
        generate: further options of transformers' `generate`, such as `do_sample=True, top_p=0.9`.

    Raises:
        ConfigError: for options that need several rows, such as `num_beams`.
        DataError: for more or fewer images than there are marks.

    Example:
        >>> prompt = processor.prompt_for("caption")
        >>> text = "".join(stream_text(captioner, prompt, [image], max_new_tokens=3))
        >>> text == captioner.generate([prompt], [image], num_beams=1, max_new_tokens=3)[0].text.lstrip()
        True
    """
    beams = {} if generate.get("num_beams", 1) == 1 else {"num_beams": _ONE_TEXT}
    check_generate({**generate, "max_new_tokens": max_new_tokens}, CAPTIONER_REFUSES | beams)
    model, processor = captioner.model, captioner.processor
    features = captioner.encoder(images).to(model.device)
    if prompt.count(IMAGE_TOKEN) != len(features):
        raise DataError(f"images: got {len(features)} for {prompt.count(IMAGE_TOKEN)} {IMAGE_TOKEN} marks in the text")
    inputs = processor.tokenizer.pad({"input_ids": [processor.encode_prompt(prompt)]}, return_tensors="pt")
    options = {
        "do_sample": False,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": end_tokens(model, processor.tokenizer),
        "pad_token_id": padding_token(model, processor.tokenizer),
        **generate,
        "num_beams": 1,
    }

    def write(streaming: dict[str, Any]) -> None:
        model.generate(
            input_ids=inputs["input_ids"].to(model.device),
            attention_mask=inputs["attention_mask"].to(model.device),
            image_features=features,
            **options,
            **streaming,
        )

    return stream_pieces(processor.tokenizer, write)


class _Until:
    """Stops generation after the token at which an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)
