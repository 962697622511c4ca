"""An explanation of one text about one image: arrays, JSON and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from frozenprefix.errors import DataError
from frozenprefix.interpret.explain.occlusion import rank_correlation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Under this mean rank correlation with occlusion a map of attention is not to be trusted.
TRUSTED = 0.3
SEEN = 1.0  # nats of evidence or occlusion: what an image contributes to a word


@dataclass(frozen=True)
class Choice:
    """A token of the text as the LM chose it: its probability, and the likeliest tokens in its place.

    Attributes:
        text: the token; probability: 0 to 1, of the token after the image and all tokens before it.
        alternatives: (token, probability), likeliest first; the token itself may be among them.

    Example:
        >>> Choice(" dog", 0.5, ((" dog", 0.5), (" cat", 0.2))).alternatives[1]
        (' cat', 0.2)
    """

    text: str
    probability: float
    alternatives: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ExplainedWord:
    """A word of the text.

    Attributes:
        text: the word, or a mark of punctuation.
        log_prob: in nats, the sum over its tokens.
        evidence: log p(word | image) − mean log p(word | other images), in nats; None without other images.
        choices: its tokens.

    Example:
        >>> ExplainedWord("dog", -0.5, 3.0).evidence
        3.0
    """

    text: str
    log_prob: float
    evidence: float | None = None
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class PrefixPosition:
    """What one prefix embedding is near to.

    Attributes:
        by_cosine: (word, cosine) of the LM's input embeddings, nearest first.
        by_head: (word, probability): what the LM would write after it has read the image up to here.

    Example:
        >>> PrefixPosition((("dog", 0.3),), ()).by_cosine
        (('dog', 0.3),)
    """

    by_cosine: tuple[tuple[str, float], ...]
    by_head: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Explanation:
    """Why a model wrote a text about an image.

    Attributes:
        image: as the encoder sees it, cropped and resized; None with precomputed features.
        name: of the image; prompt: before the text; text: that is explained.
        words: of the text, in order.
        occlusion: float32[W, g, g], by how much log p(word) falls when the image is covered around a cell of the grid.
        attention: float32[W, g, g] on the same grid; None where attention does not lead from words to patches.
        prefix: what each prefix embedding is near to; empty where no word embedding is meant.
        others: number of other images behind the evidence.
        unavailable: part of the explanation → why this model has none.

    Example:
        >>> from frozenprefix.interpret import Explainer
        >>> explanation = Explainer(captioner)(image, "a red circle")
        >>> [word.text for word in explanation.words], explanation.occlusion.shape  # 4 patches
        (['a', 'red', 'circle'], (3, 2, 2))
    """

    image: Image.Image | None
    name: str
    prompt: str
    text: str
    words: tuple[ExplainedWord, ...]
    occlusion: np.ndarray | None = None
    attention: np.ndarray | None = None
    prefix: tuple[PrefixPosition, ...] = ()
    others: int = 0
    unavailable: Mapping[str, str] = field(default_factory=dict)

    @property
    def evidence(self) -> np.ndarray | None:
        """float32[W] in nats; None without other images."""
        if not self.words or self.words[0].evidence is None:
            return None
        return np.array([word.evidence for word in self.words], dtype=np.float32)

    @property
    def rank_correlations(self) -> np.ndarray | None:
        """Spearman's correlation of the two maps of each word, float32[W]; None without either."""
        if self.attention is None or self.occlusion is None:
            return None
        maps = zip(Tensor(self.attention), Tensor(self.occlusion), strict=True)
        return np.array([rank_correlation(one, two) for one, two in maps], dtype=np.float32)

    @property
    def heat_maps(self) -> dict[str, tuple[np.ndarray, float]]:
        """The maps of each kind that there is, float32[W, g, g], and the value that is shown in full colour.

        It is the same for all words. Occlusion of less than a nat is noise, which stays dark.
        """
        kinds = {"occlusion": self.occlusion, "attention": self.attention}
        least = {"occlusion": SEEN, "attention": 0.0}
        return {kind: (maps, max(float(maps.max()), least[kind])) for kind, maps in kinds.items() if maps is not None}

    def to_dict(self) -> dict[str, Any]:
        """The explanation as JSON values, without the image."""
        correlations = self.rank_correlations
        return {
            "image": self.name,
            "prompt": self.prompt,
            "text": self.text,
            "words": [
                {
                    "text": word.text,
                    "log_prob": word.log_prob,
                    "evidence": word.evidence,
                    "tokens": [
                        {"text": each.text, "probability": each.probability, "alternatives": list(each.alternatives)}
                        for each in word.choices
                    ],
                }
                for word in self.words
            ],
            "occlusion": None if self.occlusion is None else self.occlusion.tolist(),
            "attention": None if self.attention is None else self.attention.tolist(),
            "rank_correlations": None if correlations is None else correlations.tolist(),
            "prefix": [{"by_cosine": each.by_cosine, "by_head": each.by_head} for each in self.prefix],
            "others": self.others,
            "unavailable": dict(self.unavailable),
        }

    def plot(self, words: Sequence[int] | None = None) -> Figure:
        """A matplotlib figure: the image, and under each word its maps over the image, with the evidence in the title.

        Args:
            words: numbers of the words to show; by default the eight with the highest evidence, or the first eight.

        Raises:
            DataError: for an explanation without an image or maps.

        Example:
            >>> from frozenprefix.interpret import Explainer
            >>> figure = Explainer(captioner)(image, "a red circle").plot()
            >>> len(figure.axes)  # the image, and one map for each word
            4
        """
        from frozenprefix.interpret.explain.figure import draw

        if self.image is None or self.occlusion is None:
            raise DataError(f"plot: {self.unavailable.get('occlusion', 'the explanation was made without heat maps')}")
        return draw(self, _shown(self) if words is None else list(words))


def _shown(explanation: Explanation, most: int = 8) -> list[int]:
    numbers = range(len(explanation.words))
    if explanation.evidence is not None:
        numbers = sorted(numbers, key=lambda number: -float(explanation.evidence[number]))  # type: ignore[index, assignment]
    return sorted(numbers[:most])


def trusted(explanations: Sequence[Explanation]) -> float | None:
    """Mean rank correlation of all maps of attention with those of occlusion; None where there are none.

    Example:
        >>> trusted([]) is None
        True
    """
    found = [each.rank_correlations for each in explanations]
    values = np.concatenate([each for each in found if each is not None] or [np.empty(0)])
    return float(values.mean()) if len(values) else None
