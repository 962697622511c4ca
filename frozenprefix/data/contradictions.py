"""Captions of one image that contradict each other in number or colour: "two dogs" and "three dogs".

The rules are for English. They compare the word before a noun with that before the same noun in the other captions. Two
captions may speak of different things by the same name ("a black dog", "a brown dog"), so a person has to judge.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

NUMBERS = {
    word: number
    for number, words in enumerate(["", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
    for word in (words, str(number))
    if word
}
COLOURS = frozenset(
    ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray", "tan"]
)
_SAME = {"grey": "gray", "golden": "yellow", "gold": "yellow", "blond": "yellow", "blonde": "yellow", "beige": "tan"}
#: Colours that people give to the same thing.
_CLOSE = [
    {"brown", "tan", "yellow", "orange", "red"},
    {"white", "tan", "gray", "yellow"},
    {"black", "gray", "brown"},
    {"pink", "purple", "red"},
    {"blue", "green", "purple"},
]
_WORD = re.compile(r"[a-z0-9]+(?:-[a-z]+)*")
_BETWEEN = frozenset(["big", "large", "small", "little", "young", "old", "tall", "short", "long", "dark", "light"])


@dataclass(frozen=True)
class Contradiction:
    """Two captions of one image that say different things of the same noun.

    Attributes:
        kind: "number" or "colour"; noun: in the singular.
        first, second: what the captions say of it; captions: both of them.

    Example:
        >>> contradictions(["Two dogs run.", "Three dogs on grass."])[0].noun
        'dog'
    """

    kind: Literal["number", "colour"]
    noun: str
    first: str
    second: str
    captions: tuple[str, str]


def contradictions(captions: Sequence[str]) -> list[Contradiction]:
    """Contradictions among the captions of one image, each noun once.

    Example:
        >>> found = contradictions(["A black dog.", "A white dog runs.", "Two dogs."])
        >>> [(each.kind, each.first, each.second) for each in found]
        [('colour', 'black', 'white')]
    """
    found: dict[tuple[str, str], Contradiction] = {}
    said = [(text, _counted(text), _coloured(text)) for text in captions]
    for (text, counts, colours), (other, other_counts, other_colours) in combinations(said, 2):
        for noun in sorted(counts.keys() & other_counts.keys()):
            if counts[noun] != other_counts[noun]:
                one, two = str(counts[noun]), str(other_counts[noun])
                found.setdefault(("number", noun), Contradiction("number", noun, one, two, (text, other)))
        for noun in sorted(colours.keys() & other_colours.keys()):
            if _far_apart(colours[noun], other_colours[noun]):
                one, two = (" and ".join(sorted(each)) for each in (colours[noun], other_colours[noun]))
                found.setdefault(("colour", noun), Contradiction("colour", noun, one, two, (text, other)))
    return list(found.values())


def _counted(text: str) -> dict[str, int]:
    """Noun → number before it, for plural nouns and numbers from two; a noun with two numbers is left out."""
    counts: dict[str, set[int]] = {}
    words = _WORD.findall(text.lower())
    for place, word in enumerate(words):
        number = NUMBERS.get(word, 0)
        noun = _noun_after(words, place)
        if number >= 2 and noun is not None and _singular(noun) != noun:
            counts.setdefault(_singular(noun), set()).add(number)
    return {noun: numbers.pop() for noun, numbers in counts.items() if len(numbers) == 1}


def _coloured(text: str) -> dict[str, set[str]]:
    """Noun → colours before it: "black and white dog". A noun that occurs twice is left out: it may be two things."""
    words = [_SAME.get(word, word) for word in _WORD.findall(text.lower())]
    colours: dict[str, set[str]] = {}
    for place, word in enumerate(words):
        if word not in COLOURS:
            continue
        noun = _noun_after(words, place)
        if noun is not None:
            colours.setdefault(_singular(noun), set()).add(word)
    nouns = [_singular(word) for word in words]
    return {noun: each for noun, each in colours.items() if nouns.count(noun) == 1}


def _noun_after(words: Sequence[str], place: int) -> str | None:
    """The first word after `place` that is no colour, size or "and"; None at the end of the text."""
    for word in words[place + 1 : place + 5]:
        if word not in COLOURS and word not in _BETWEEN and word not in ("and", "colored", "coloured"):
            return word if len(word) > 2 and word not in ("the", "with", "are", "who") else None
    return None


def _singular(noun: str) -> str:
    irregular = {
        "men": "man",
        "women": "woman",
        "people": "person",
        "children": "child",
        "kids": "child",
        "kid": "child",
    }
    if noun in irregular:
        return irregular[noun]
    if noun.endswith(("ches", "shes", "sses", "xes")):
        return noun[:-2]
    return noun[:-1] if noun.endswith("s") and not noun.endswith(("ss", "us", "is")) else noun


def _far_apart(one: set[str], two: set[str]) -> bool:
    """Whether no colour of one is a colour of the other, or close to it."""
    return not any(a == b or any({a, b} <= close for close in _CLOSE) for a in one for b in two)
