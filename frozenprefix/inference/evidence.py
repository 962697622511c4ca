"""Evidence: how much likelier a word is after its own image than after other images.

    evidence(word) = log p(word | image, words before it) − mean over other images of the same

The habits of language and of the data set are in both terms, so what is left is what the image says. A word is the sum
of its tokens. It is in nats: 0 says that the image makes no difference, 3 that it makes the word 20 times as likely.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frozenprefix.data.image_encoder import ImageInput
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.inference.captioner import Captioner
from frozenprefix.inference.likelihood import token_log_likelihoods
from frozenprefix.models.packing import Target

_TEXTS_AT_ONCE = 8
_WORD = re.compile(r"\w+(?:['’\-]\w+)*|[^\w\s]+")

#: why there is no evidence for some models
RETRIEVES = (
    "this checkpoint was trained with the captions of similar images in its prompts, which say as much about an image "
    "as its prefix; there is no prompt that fits the other images as well"
)


@dataclass(frozen=True)
class Word:
    """A word or a mark of punctuation in a text, with its tokens.

    Attributes:
        text: without blanks; start, stop: its characters in the text.
        first, last: its tokens are `ids[first:last]`. A word that shares its token with the one before has none.

    Example:
        >>> [word.text for word in split_words(processor.tokenizer, processor.encode_target("", "a dog.")[:-1])]
        ['a', 'dog', '.']
    """

    text: str
    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class WordEvidence:
    """A word, its log-probability in nats after the image, and its evidence (None without other images).

    Example:
        >>> WordEvidence("dog", -0.5, 3.0).evidence
        3.0
    """

    text: str
    log_prob: float
    evidence: float | None = None


def split_words(tokenizer: Any, ids: Sequence[int]) -> list[Word]:
    """The words of a text, and which of its tokens each has: every token belongs to the word in which it ends.

    Args:
        ids: tokens of the text, without an end token.

    Example:
        >>> ids = processor.encode_target("", "the dog sits")[:-1]
        >>> words = split_words(processor.tokenizer, ids)
        >>> [word.text for word in words], words[-1].last == len(ids)
        (['the', 'dog', 'sits'], True)
    """
    # as a text is decoded token by token, a character that several tokens make up counts for the last of them
    ends = [len(tokenizer.decode(ids[: place + 1]).rstrip("�")) for place in range(len(ids))]
    words: list[Word] = []
    token = 0
    spans = [match.span() for match in _WORD.finditer(tokenizer.decode(ids))]
    text = tokenizer.decode(ids)
    for number, (start, stop) in enumerate(spans):
        first = token
        is_last = number + 1 == len(spans)
        while token < len(ids) and (ends[token] <= stop or is_last):
            token += 1
        if token < len(ids) and first == token and ends[token] > stop > (ends[token - 1] if token else 0):
            token += 1  # the token goes on into the next word
        words.append(Word(text[start:stop], start, stop, first, token))
    return words


def target_of(captioner: Captioner, prompt: str, text: str) -> Target:
    """A prompt and the text after it, closed by the end token, for `token_log_likelihoods`.

    Example:
        >>> target_of(captioner, "<image>", "a dog").num_context  # a prefix of 2
        2
    """
    context = captioner.processor.encode_prompt(prompt)
    return Target([*context, *captioner.processor.encode_target(prompt, text)], len(context))


class EvidenceScorer:
    """Evidence of the words of texts, against fixed other images.

    Args:
        captioner: the model.
        others: image files, PIL images, or image features float[M, N, D_enc] of M other images. Those of the same
            kind as the ones asked about tell most: other photos of the collection. Sixteen are enough for a mean.

    Raises:
        DataError: for no other images.

    Example:
        >>> scorer = EvidenceScorer(captioner, [images_folder / "blue_circle.png", images_folder / "red_cross.png"])
        >>> words = scorer(["<image>"], ["a red circle"], captioner.encoder([image]))[0]
        >>> [word.text for word in words]
        ['a', 'red', 'circle']
    """

    def __init__(self, captioner: Captioner, others: Sequence[ImageInput] | Tensor):
        if len(others) == 0:
            raise DataError("others: got no images; evidence compares an image with others, give some of the same kind")
        if captioner.retriever is not None:
            raise ConfigError(f"evidence: {RETRIEVES}")
        self.captioner = captioner
        with torch.inference_mode():
            features = captioner.encoder(others).to(captioner.model.device)
            # [M, N, D_enc] -> [M, P, D_lm]
            self.others = captioner.model.map_features(features)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], texts: Sequence[str], features: Tensor) -> list[list[WordEvidence]]:
        """The words of one text for each image.

        Args:
            prompts: with one `<image>` each; texts: what follows them.
            features: float[n, N, D_enc] of the images of the texts.

        Returns:
            For each text its words, in order; none for an empty text.
        """
        results: list[list[WordEvidence]] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = slice(start, start + _TEXTS_AT_ONCE)
            results += self._part(prompts[part], texts[part], features[part])
        return results

    def _part(self, prompts: Sequence[str], texts: Sequence[str], features: Tensor) -> list[list[WordEvidence]]:
        results: list[list[WordEvidence]] = [[] for _ in texts]
        told = [place for place, text in enumerate(texts) if text.strip()]
        if not told:
            return results
        targets = [target_of(self.captioner, prompts[place], texts[place]) for place in told]
        own = self.captioner.model.map_features(features[told].to(self.others.device))
        # its own image and M others for each text: [texts * (1 + M), P, D_lm]
        embeds = torch.cat([torch.cat([mine[None], self.others]) for mine in own])
        groups = [group for target in targets for group in [[target]] * (1 + len(self.others))]
        scored = token_log_likelihoods(self.captioner.model, groups, embeds)
        for number, (place, target) in enumerate(zip(told, targets, strict=True)):
            first = number * (1 + len(self.others))
            # [1 + M, tokens], without the end token
            log_probs = torch.stack([tokens for (tokens,) in scored[first : first + 1 + len(self.others)]])[:, :-1]
            ids = target.input_ids[target.num_context : -1]
            results[place] = _of_words(self.captioner.processor.tokenizer, ids, log_probs)
        return results


def _of_words(tokenizer: Any, ids: Sequence[int], log_probs: Tensor) -> list[WordEvidence]:
    """Sums over the tokens of each word; `log_probs`: float32[1 + M, tokens], those of the text's own image first."""
    words = []
    for word in split_words(tokenizer, ids):
        # [1 + M]
        sums = log_probs[:, word.first : word.last].sum(dim=1)
        words.append(WordEvidence(word.text, float(sums[0]), float(sums[0] - sums[1:].mean())))
    return words
