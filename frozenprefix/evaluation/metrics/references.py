"""Reference captions, tokenised and counted once, to score any number of prediction sets against."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from frozenprefix.data.neighbours import MAX_N, ngram_counts
from frozenprefix.errors import DataError
from frozenprefix.evaluation.metrics.ptb import ptb_tokenize

logger = logging.getLogger(__name__)

Ngram = tuple[str, ...]
Counts = dict[Ngram, int]


@dataclass(frozen=True)
class Caption:
    """One tokenised caption. `tokens` may hold no-break spaces ("3 1/2"); `words` are split there, as for BLEU.

    `plain` is the text itself, in small letters, to compare where tokenisation leaves nothing of it ("!").
    """

    tokens: list[str]
    words: list[str]
    counts: Counts
    plain: str

    @classmethod
    def from_text(cls, text: str) -> Caption:
        tokens = ptb_tokenize(text)
        words = " ".join(tokens).split()
        return cls(tokens, words, ngram_counts(words), " ".join(text.lower().split()))


@dataclass(frozen=True)
class TfIdf:
    """A caption's CIDEr vector: the weight of each n-gram, and the norm for each n."""

    weights: dict[Ngram, float]
    norms: list[float]
    length: int


class CaptionReferences:
    """The reference captions of a set of images, with their n-grams and CIDEr weights.

    Args:
        references: image id → its reference captions as plain text, at least one each.
        df: document frequencies for CIDEr from another corpus: (n-gram as a tuple of words → number of images whose
            captions have it, number of images). By default they come from `references`, as in pycocoevalcap.

    Raises:
        DataError: no image, an image without captions, or frequencies above the number of images.

    Example:
        >>> references = CaptionReferences({"1": ["a dog runs"], "2": ["a cat sits"]})
        >>> references.document_frequencies()[("a",)]
        2
    """

    def __init__(self, references: Mapping[str, Sequence[str]], df: tuple[Mapping[Ngram, float], float] | None = None):
        _check_references(references)
        self.captions = {key: [Caption.from_text(text) for text in texts] for key, texts in references.items()}
        frequencies, images = df if df is not None else (self.document_frequencies(), float(len(self.captions)))
        if images < 1 or max(frequencies.values(), default=0) > images:
            raise DataError(
                f"df must be (frequencies, number of images) with no frequency above that number; got {images} "
                f"images and a frequency of {max(frequencies.values(), default=0)}"
            )
        if images == 1:
            logger.warning("CIDEr-D is 0 with the document frequencies of a single image; give df or more images")
        self._log_images = math.log(images)
        self._log_df = {ngram: math.log(max(1.0, count)) for ngram, count in frequencies.items()}
        self.max_counts = {key: _max_counts(captions) for key, captions in self.captions.items()}
        self.tf_idf = {key: [self.weigh(each.counts) for each in captions] for key, captions in self.captions.items()}

    def __len__(self) -> int:
        return len(self.captions)

    def document_frequencies(self) -> Counter[Ngram]:
        """Return for each n-gram the number of images with at least one reference that has it."""
        return Counter(
            ngram for captions in self.captions.values() for ngram in {n for each in captions for n in each.counts}
        )

    def weigh(self, counts: Counts) -> TfIdf:
        """Return the CIDEr vector of a caption's n-grams (Vedantam et al. 2015, equation 1; tf is the raw count)."""
        weights, squares, length = {}, [0.0] * MAX_N, 0
        for ngram, count in counts.items():
            weight = count * (self._log_images - self._log_df.get(ngram, 0.0))
            weights[ngram] = weight
            squares[len(ngram) - 1] += weight * weight
            if len(ngram) == 2:
                length += count  # the reference implementation measures length in bigrams
        return TfIdf(weights, [math.sqrt(square) for square in squares], length)


def _max_counts(captions: Iterable[Caption]) -> Counts:
    most: Counts = {}
    for caption in captions:
        for ngram, count in caption.counts.items():
            if count > most.get(ngram, 0):
                most[ngram] = count
    return most


def _check_references(references: Mapping[str, Sequence[str]]) -> None:
    if not references:
        raise DataError("references are empty; expected at least one image with captions")
    bad = [key for key, texts in references.items() if isinstance(texts, str) or not len(texts)]
    if bad:
        raise DataError(
            f"references of {len(bad)} images are not a list of at least one caption, first {bad[0]!r}: "
            f"got {references[bad[0]]!r}; give a list, or leave the image out"
        )
