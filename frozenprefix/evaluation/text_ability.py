"""Perplexity of a language model on text alone, to see whether training on images has changed it."""

from __future__ import annotations

import hashlib
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from frozenprefix.errors import DataError
from frozenprefix.models.freezing import evaluating
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration

WINDOW = 512  # tokens read at once, at most


@dataclass(frozen=True)
class TextAbility:
    """How well a language model predicts a text.

    Attributes:
        perplexity: exponential of the mean negative log-likelihood of a token, given those before it in its window.
        tokens: number of predicted tokens.
        logits_sha256: hash of all logits, in the LM's dtype; equal hashes mean that the LM is unchanged to the bit.

    Example:
        >>> TextAbility(perplexity=12.5, tokens=400, logits_sha256="0" * 64).perplexity
        12.5
    """

    perplexity: float
    tokens: int
    logits_sha256: str


def text_perplexity(
    model: FrozenPrefixForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    adapted: bool = True,
) -> float:
    """Perplexity of a model's LM on a text, without an image; see `text_ability`.

    Example:
        >>> text_perplexity(model, processor.tokenizer, "the dog runs on grass") > 1
        True
    """
    return text_ability(model, tokenizer, text, adapted=adapted).perplexity


def text_ability(
    model: FrozenPrefixForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    adapted: bool = True,
) -> TextAbility:
    """Measure a model's LM on a text, without an image.

    The text is read in windows of up to 512 tokens that do not overlap, each after the LM's start token if it has one.

    Args:
        adapted: False measures the bare LM, its adapters switched off.

    Raises:
        DataError: for a text of fewer than 2 tokens.

    Example:
        >>> ability = text_ability(model, processor.tokenizer, "the dog runs on grass")
        >>> ability.perplexity > 1
        True
    """
    language_model: Any = model.language_model
    positions = getattr(language_model.config.get_text_config(), "max_position_embeddings", None) or WINDOW
    digest = hashlib.sha256()
    loss, count = 0.0, 0
    with evaluating(model), nullcontext() if adapted else model.bare_language_model():
        for window in text_windows(tokenizer, text, min(WINDOW, positions)):
            ids = torch.tensor([window], device=model.device)
            logits = language_model(input_ids=ids).logits[0]
            digest.update(logits.contiguous().cpu().view(torch.uint8).numpy().tobytes())
            loss += float(F.cross_entropy(logits[:-1].float(), ids[0, 1:], reduction="sum"))
            count += len(window) - 1
    return TextAbility(math.exp(loss / count), count, digest.hexdigest())


def text_windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> list[list[int]]:
    """Token ids of a text in windows of `length`, each with the tokenizer's start token in front if it sets one.

    Raises:
        DataError: for a text of fewer than 2 tokens.
    """
    start = [] if tokenizer.bos_token_id is None else tokenizer("")["input_ids"][:1]
    start = start if start == [tokenizer.bos_token_id] else []
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    size = length - len(start)
    windows = [[*start, *ids[at : at + size]] for at in range(0, len(ids), size)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise DataError(f"text: got {len(ids)} tokens, expected at least 2, the first to predict the second from")
    return windows


def read_text(path: str | Path, key: str) -> str:
    """The text of a UTF-8 file.

    Args:
        key: name of the option in error messages.

    Raises:
        DataError: for a file that is missing or not UTF-8.
    """
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{key}: got '{path}', expected a text file in UTF-8 that exists ({error})") from error
