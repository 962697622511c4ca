"""Accuracy of short answers: the VQA v2 measure, and exact match.

Rules of the answer normalisation: Antol et al. 2015, "VQA: Visual Question Answering", and the evaluation page of
visualqa.org. The contraction table is derived from the list of contractions in their proper spelling.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from frozenprefix.errors import DataError
from frozenprefix.evaluation.metrics.ids import check_same_ids

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_WITH_COMMA = re.compile(r"\d,\d")
_LOOSE_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_WORDS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
# The contractions of the published script. It leaves out "he'll", "we'll", "she'd", "we'd" and "i'm": without the
# apostrophe they are other words, or it looks for a capital I in text that is lower-cased.
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd "
    "somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've "
    "something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas "
    "wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've "
    "who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd "
    "you'd've you'll you're you've"
)


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, char in enumerate(word) if char == "'"]


_RESTORED = {short: word for word in _CONTRACTIONS.split() for short in _without_one_apostrophe(word)}


def normalize_vqa_answer(text: str) -> str:
    """Return `text` as the VQA v2 measure compares it.

    Lower case; no articles; number words up to ten as digits ("none" is 0); the apostrophe of a contraction restored;
    a punctuation mark beside a space is dropped, between letters it becomes a space ("black-white" → "black white"),
    and with a comma between digits all are dropped ("1,000" → "1000"); periods go unless a digit follows ("2.5").

    Example:
        >>> normalize_vqa_answer("The two dogs.")
        '2 dogs'
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    numeric = _DIGITS_WITH_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if numeric or beside_space else " ")
    words = (_NUMBER_WORDS.get(word, word) for word in _LOOSE_PERIOD.sub("", cleaned).lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def comparable_answer(text: str) -> str:
    """The normalised answer; if normalisation leaves nothing ("A", "+", "?"), the answer itself in lower case.

    Example:
        >>> comparable_answer("the dog"), comparable_answer("A"), comparable_answer("the")
        ('dog', 'a', 'the')
    """
    return normalize_vqa_answer(text) or " ".join(text.lower().split())


def vqa_accuracy(
    predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]], *, compat: bool = False
) -> dict[str, float]:
    """Score answers against those of several annotators: an answer that three of them gave is right.

    Each annotator is left out once and min(1, matches among the others / 3) is computed; the score is the mean. Ten
    annotators is the usual number. With fewer than four, "three" is the number of the others; with one, the score is an
    exact match of the normalised strings.

    Args:
        predictions: question id → answer.
        answers: question id → the annotators' answers, at least one.
        compat: repeat the faults of the published script, to compare with published numbers: prediction and answers
            are compared without normalisation where all annotators agree, and three matches are always needed.

    Returns:
        question id → score in [0, 1].

    Raises:
        DataError: an id is missing or unexpected, or a question has no answer.

    Example:
        >>> vqa_accuracy({"1": "red"}, {"1": ["red", "red", "dark red", "red"]})
        {'1': 0.75}
    """
    _check(predictions, answers)
    return {key: _soft_accuracy(predictions[key], texts, compat) for key, texts in answers.items()}


def _check(predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]) -> None:
    check_same_ids(predictions, answers, "answers")
    for key, texts in answers.items():
        if isinstance(texts, str) or not texts:
            raise DataError(f"answers[{key!r}] must be a list of at least one answer, got {texts!r}")


def _soft_accuracy(prediction: str, answers: Sequence[str], compat: bool) -> float:
    if compat and len({_trim(answer) for answer in answers}) == 1:
        prediction, answers = _trim(prediction), [_trim(answer) for answer in answers]
    else:
        normalise = normalize_vqa_answer if compat else comparable_answer
        prediction, answers = normalise(prediction), [normalise(answer) for answer in answers]
    matches, total = sum(answer == prediction for answer in answers), len(answers)
    if total == 1 and not compat:
        return float(matches)
    needed = 3 if compat else min(3, total - 1)
    left_out_matches = min(1.0, (matches - 1) / needed) if matches else 0.0
    left_out_differs = min(1.0, matches / needed)
    return (matches * left_out_matches + (total - matches) * left_out_differs) / total


def _trim(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def exact_match(
    predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]], *, underscores_as_spaces: bool = False
) -> dict[str, float]:
    """Score 1 where the prediction equals one of the answers but for case and spaces, else 0.

    Args:
        predictions: question id → answer.
        answers: question id → the right answers, at least one. A list inside one string ("book, scissor", as DAQUAR
            has) is compared as one text, order included.
        underscores_as_spaces: take "tape_dispenser" and "tape dispenser" as equal, for DAQUAR.

    Returns:
        question id → 0.0 or 1.0.

    Raises:
        DataError: an id is missing or unexpected, or a question has no answer.

    Example:
        >>> exact_match({"1": "Red ", "2": "dog"}, {"1": ["red"], "2": ["cat"]})
        {'1': 1.0, '2': 0.0}
    """
    _check(predictions, answers)

    def plain(text: str) -> str:
        text = text.replace("_", " ") if underscores_as_spaces else text
        return " ".join(text.lower().split())

    return {key: float(plain(predictions[key]) in map(plain, texts)) for key, texts in answers.items()}


def by_group(scores: Mapping[str, float], groups: Mapping[str, str]) -> dict[str, float]:
    """Return the mean score of each group, by name: question types, answer types.

    Args:
        scores: id → score.
        groups: id → group. It may have more ids than `scores`, not fewer.

    Raises:
        DataError: a scored id has no group.

    Example:
        >>> by_group({"1": 1.0, "2": 0.0, "3": 1.0}, {"1": "color", "2": "color", "3": "shape"})
        {'color': 0.5, 'shape': 1.0}
    """
    lost = [key for key in scores if key not in groups]
    if lost:
        raise DataError(f"groups must name a group for every scored id; {len(lost)} have none, first {lost[0]!r}")
    collected: dict[str, list[float]] = {}
    for key, score in scores.items():
        collected.setdefault(groups[key], []).append(score)
    return {name: sum(values) / len(values) for name, values in sorted(collected.items())}
