"""Exported files, run in the other engine beside this package: errors of embeddings, greedy texts token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from frozenprefix.export.gguf import LM_FILE, MMPROJ_FILE
from frozenprefix.export.source import Source, built_in_images, until_end
from frozenprefix.utils.images import to_image

Engine = Callable[[Image.Image, int], tuple[np.ndarray, list[int]]]
"""Image, most new tokens -> prefix embeddings float32[P, D_lm], greedy token ids."""


@dataclass(frozen=True)
class Verification:
    """One image in both engines.

    Attributes:
        image: name of the image.
        error: largest absolute difference of two numbers of the prefix embeddings.
        size: root mean square of the prefix embeddings here.
        text, other_text: greedy captions here and there.
        first_difference: number of the first token that differs, from 0; None when none does.

    Example:
        >>> print(Verification("a.png", 2e-5, 0.1, "a dog", "a dog", None))
        a.png: largest error of the embeddings 2.0e-05 (their size is 1.0e-01); greedy texts are equal
    """

    image: str
    error: float
    size: float
    text: str
    other_text: str
    first_difference: int | None

    def __str__(self) -> str:
        where = "greedy texts are equal"
        if self.first_difference is not None:
            texts = f"{self.text!r} here, {self.other_text!r} there"
            where = f"greedy texts differ from token {self.first_difference} on: {texts}"
        return (
            f"{self.image}: largest error of the embeddings {self.error:.1e} (their size is {self.size:.1e}); {where}"
        )


def verify_llava(
    source: Source, folder: str | Path, images: Sequence[str | Path] = (), max_new_tokens: int = 30
) -> list[Verification]:
    """Compare a folder of `export_llava`, loaded by transformers alone, with the checkpoint.

    Args:
        images: files; two built-in drawings when there are none.

    Example:
        >>> verify_llava(Source.load("runs/mine/best"), "exported/llava")  # doctest: +SKIP
    """
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor: Any = LlavaProcessor.from_pretrained(folder)

    @torch.no_grad()
    def run(image: Image.Image, length: int) -> tuple[np.ndarray, list[int]]:
        inputs = processor(images=image, text=source.prompt(), return_tensors="pt")
        features = model.get_image_features(inputs["pixel_values"], **_reading(model.config))
        ids = model.generate(**inputs, max_new_tokens=length, do_sample=False, num_beams=1)[0]
        new = until_end(ids[inputs["input_ids"].shape[1] :].tolist(), source.end_tokens)
        return features.pooler_output[0].numpy(), new

    return _compare(source, images, max_new_tokens, run)


def _reading(config: Any) -> dict[str, Any]:
    names = ("vision_feature_layer", "vision_feature_select_strategy")
    return {name: getattr(config, name) for name in names}


def verify_gguf(
    source: Source, folder: str | Path, images: Sequence[str | Path] = (), max_new_tokens: int = 30
) -> list[Verification]:
    """Compare the files of `export_gguf`, run by llama.cpp alone, with the checkpoint.

    Args:
        images: files; two built-in drawings when there are none. They are resized to the encoder's size here, since
            llama.cpp's resizing is its own.

    Raises:
        ConfigError: llama.cpp is not installed.

    Example:
        >>> verify_gguf(Source.load("runs/mine/best"), "exported/gguf", ["photo.jpg"])  # doctest: +SKIP
    """
    from frozenprefix.inference.llama_cpp.language_model import LlamaCppModel
    from frozenprefix.inference.llama_cpp.vision import MARKER, LlamaCppVision
    from frozenprefix.models.processing import IMAGE_TOKEN

    length = source.processor.prefix_length + len(source.prompt()) + max_new_tokens + 8
    llama = LlamaCppModel(Path(folder) / LM_FILE, prompts=1, positions=length)
    vision = LlamaCppVision(Path(folder) / MMPROJ_FILE, llama)

    def run(image: Image.Image, length: int) -> tuple[np.ndarray, list[int]]:
        segments = vision.read(source.prompt().replace(IMAGE_TOKEN, MARKER), [image])
        embeds = np.concatenate([segment for segment in segments if isinstance(segment, np.ndarray)])
        text = llama.generate([segments], max_new_tokens=length, end_tokens=source.end_tokens)[0]
        return embeds, text.ids

    return _compare(source, images, max_new_tokens, run)


def _compare(source: Source, images: Sequence[str | Path], max_new_tokens: int, run: Engine) -> list[Verification]:
    size = source.image_size
    named = [(Path(path).name, to_image(path).resize((size, size))) for path in images]
    named = named or [(f"built-in image {n}", image) for n, image in enumerate(built_in_images(size), start=1)]
    results = []
    for name, image in named:
        ours, ids = source.prefix(image).numpy(), source.greedy(image, max_new_tokens)
        theirs, other = run(image, max_new_tokens)
        results.append(
            Verification(
                image=name,
                error=float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf"),
                size=float(np.sqrt(np.square(ours).mean())),
                text=source.processor.decode(ids),
                other_text=source.processor.decode(other),
                first_difference=first_difference(ids, other),
            )
        )
    return results


def first_difference(ids: Sequence[int], other: Sequence[int]) -> int | None:
    """Number of the first token that differs; None when none does.

    Example:
        >>> first_difference([5, 6, 7], [5, 9, 7]), first_difference([5], [5]), first_difference([5], [5, 6])
        (1, None, 1)
    """
    if list(ids) == list(other):
        return None
    pairs = enumerate(zip(ids, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(ids), len(other)))
