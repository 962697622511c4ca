"""Captions without what the image does not support: words whose evidence is under a floor are dropped or cut off.

The rules are for English captions:

- a colour, number or size without support is dropped: "a man in a blue shirt" becomes "a man in a shirt";
- any other word without support is cut off with its phrase and what follows, at the nearest preposition, conjunction,
  comma or form of "to be" before it: "a dog runs on the beach" becomes "a dog runs";
- if what the caption begins with has no support, there is no caption.

Function words ("a", "is", "of") are never asked for support.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from frozenprefix.data.image_encoder import ImageInput
from frozenprefix.data.images import BadImages
from frozenprefix.inference.captioner import Caption, Captioner
from frozenprefix.inference.evidence import EvidenceScorer, WordEvidence

#: Words that say nothing of an image by themselves.
FUNCTION_WORDS = frozenset(
    """
    a an of the this that these those his her its their my your our he she it they them him be been
    being has have had do does did will would can could there here who which what than then so very some any each
    other another one's own s 's not no up down out off away
    """.split()  # noqa: SIM905 - a list of words is read as words
)
#: Before such a word a caption can end.
BOUNDARIES = frozenset(
    """
    in on at with by near under above behind beside between through across along around into onto over from to
    for against towards toward during inside outside next while and or but as wearing holding carrying
    using is are was were
    """.split()  # noqa: SIM905 - a list of words is read as words
)
#: Words that can be left out, and leave a sentence.
MODIFIERS = frozenset(
    """
    red orange yellow green blue purple pink brown black white gray grey golden blond blonde tan dark light bright
    one two three four five six seven eight nine ten several many big large small little tiny huge long short tall
    young old
    """.split()  # noqa: SIM905 - a list of words is read as words
)


@dataclass(frozen=True)
class SupportedCaption(Caption):
    """A caption, without what its image does not support; its text may be empty, its score is that of the whole.

    Attributes:
        whole: the caption as the model wrote it.
        dropped: what was taken out, in order.
        evidence: lowest evidence of a word of the whole caption that is no function word, in nats; None without one.

    Example:
        >>> SupportedCaption(image_path, "a dog", -0.5, "a dog on a beach", ("on a beach",), -0.2).dropped
        ('on a beach',)
    """

    whole: str = ""
    dropped: tuple[str, ...] = ()
    evidence: float | None = None


class SupportedCaptioner:
    """Captions images, and leaves out what has less evidence than `floor`.

    Args:
        captioner: the model.
        others: images to compare with; see `EvidenceScorer`.
        floor: nats. 0 leaves out what fits other images better; 0.5 also what the image hardly makes likelier.

    Example:
        >>> supported = SupportedCaptioner(captioner, [images_folder / "blue_cross.png"], floor=-100.0)
        >>> [(caption.text == caption.whole, caption.dropped) for caption in supported.caption([image_path])]
        [(True, ())]
    """

    def __init__(self, captioner: Captioner, others: Sequence[ImageInput] | Tensor, floor: float):
        self.captioner = captioner
        self.scorer = EvidenceScorer(captioner, others)
        self.floor = floor

    def caption(
        self, paths: Iterable[str | Path], *, prompt: str | None = None, bad: BadImages | None = None, **generate: Any
    ) -> Iterator[SupportedCaption]:
        """Caption image files, in order; arguments and errors as of `Captioner.caption`."""
        captioner = self.captioner
        text = captioner.processor.prompt_for("caption") if prompt is None else captioner.processor.with_image(prompt)
        options = {"num_beams": 5, "max_new_tokens": 30, **generate}
        for files, features in captioner.encoder.batches(map(Path, paths), captioner.batch_size, bad):
            prompts = [text] * len(files)
            written = captioner.generate(prompts, features, **options)
            words = self.scorer(prompts, [each.text.strip() for each in written], features)
            for path, each, told in zip(files, written, words, strict=True):
                kept, dropped = supported(each.text.strip(), told, self.floor)
                lowest = lowest_evidence(told)
                yield SupportedCaption(Path(str(path)), kept, each.score, each.text.strip(), dropped, lowest)


def lowest_evidence(words: Sequence[WordEvidence]) -> float | None:
    """The lowest evidence of the words that are no function words; None without such a word.

    Example:
        >>> lowest_evidence([WordEvidence("a", -1.0, -1.0), WordEvidence("dog", -0.5, 3.0)])
        3.0
    """
    return min((word.evidence or 0.0 for word in words if _says_something(word.text)), default=None)


def _says_something(word: str) -> bool:
    return word[0].isalnum() and word.lower() not in FUNCTION_WORDS | BOUNDARIES


def supported(text: str, words: Sequence[WordEvidence], floor: float) -> tuple[str, tuple[str, ...]]:
    """A text without its unsupported words, and what was taken out.

    Args:
        words: of the text, in order.

    Example:
        >>> told = [WordEvidence(word, 0.0, value) for word, value in
        ...         [("A", 0.0), ("dog", 3.0), ("in", 0.0), ("a", 0.0), ("red", -0.5), ("coat", 1.0), ("on", 0.0),
        ...          ("a", 0.0), ("beach", -1.0), (".", 0.0)]]
        >>> supported("A dog in a red coat on a beach.", told, floor=0.0)
        ('A dog in a coat.', ('red', 'on a beach'))
    """
    spans = _spans(text, words)
    weak = [_says_something(word.text) and (word.evidence or 0.0) < floor for word in words]
    end = len(words)
    for number, is_weak in enumerate(weak):
        if is_weak and words[number].text.lower() not in MODIFIERS:
            end = _boundary(words, number)
            break
    closing = words[-1].text if words and words[-1].text in (".", "!", "?") else ""
    last = len(words) - bool(closing)
    asked = [place for place in range(len(words)) if _says_something(words[place].text)]
    # no caption without a supported word; one in which no word says anything stays as it is
    if any(weak) and not any(place < end and not weak[place] for place in asked):
        return "", (text,)
    gone = {number for number in range(min(end, last)) if weak[number]}
    gone |= _orphaned(words, gone)
    dropped = [text[slice(*spans[number])] for number in sorted(gone) if weak[number]]
    if end < last:
        dropped.append(text[spans[end][0] : spans[last - 1][1]])
    if not dropped:
        return text, ()
    kept = [number for number in range(min(end, last)) if number not in gone]
    return _joined(text, spans, kept) + closing, tuple(dropped)


def _spans(text: str, words: Sequence[WordEvidence]) -> list[tuple[int, int]]:
    spans, place = [], 0
    for word in words:
        start = text.find(word.text, place)
        start = place if start < 0 else start
        place = start + len(word.text)
        spans.append((start, place))
    return spans


def _boundary(words: Sequence[WordEvidence], number: int) -> int:
    """The nearest place at or before a word where a text can end; 0 for none after the first word."""
    for place in range(number, 0, -1):
        if words[place].text.lower() in BOUNDARIES or words[place].text in (",", ";"):
            return place
    return 0


def _orphaned(words: Sequence[WordEvidence], gone: set[int]) -> set[int]:
    """An "and" or comma beside a dropped modifier that joins nothing any more."""
    return {
        number
        for number in range(1, len(words) - 1)
        if words[number].text.lower() in ("and", ",")
        and (number - 1 in gone or number + 1 in gone)
        and words[number - 1].text.lower() in MODIFIERS
        and words[number + 1].text.lower() in MODIFIERS
    }


def _joined(text: str, spans: Sequence[tuple[int, int]], kept: Sequence[int]) -> str:
    """The kept words, with the blanks that the text has before them."""
    parts: list[str] = []
    for number in kept:
        start = spans[number - 1][1] if number else 0
        before = text[start : spans[number][0]] if parts else ""
        parts.append(before + text[slice(*spans[number])])
    joined = "".join(parts)
    # "a orange ball" becomes "a ball", and "an orange ball" too
    words = joined.split(" ")
    for place, word in enumerate(words[:-1]):
        if word.lower() == "an" and words[place + 1][:1].lower() not in "aeiou":
            words[place] = word[:-1]
        elif (
            word.lower() == "a" and words[place + 1][:1].lower() in "aeiou" and f"{word} {words[place + 1]}" not in text
        ):
            words[place] = word + "n"
    return " ".join(words)
