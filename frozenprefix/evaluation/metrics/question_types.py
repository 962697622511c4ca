"""The kinds of questions and answers by which VQA v2 tabulates accuracy (Antol et al. 2015, section 4)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from frozenprefix.evaluation.metrics.vqa import normalize_vqa_answer

OTHER_TYPE = "none of the above"
_FIRST_WORDS = (
    "are",
    "are the",
    "are there",
    "are there any",
    "are these",
    "are they",
    "can you",
    "could",
    "do",
    "do you",
    "does the",
    "does this",
    "has",
    "how",
    "how many",
    "how many people are",
    "how many people are in",
    "is",
    "is he",
    "is it",
    "is that a",
    "is the",
    "is the man",
    "is the person",
    "is the woman",
    "is there",
    "is there a",
    "is this",
    "is this a",
    "is this an",
    "is this person",
    "was",
    "what",
    "what animal is",
    "what are",
    "what are the",
    "what brand",
    "what color",
    "what color are the",
    "what color is",
    "what color is the",
    "what does the",
    "what is",
    "what is in the",
    "what is on the",
    "what is the",
    "what is the color of the",
    "what is the man",
    "what is the name",
    "what is the person",
    "what is the woman",
    "what is this",
    "what kind of",
    "what number is",
    "what room is",
    "what sport is",
    "what time",
    "what type of",
    "where are the",
    "where is the",
    "which",
    "who is",
    "why",
    "why is the",
)
_KNOWN = frozenset(tuple(words.split()) for words in _FIRST_WORDS)
_LONGEST = max(map(len, _KNOWN))
_NUMBER = re.compile(r"\d+(\.\d+)?")


def question_type(question: str) -> str:
    """The longest of VQA v2's question beginnings that the question starts with, or "none of the above"."""
    words = re.findall(r"[\w']+", question.lower().replace("what's", "what is"))
    for length in range(min(_LONGEST, len(words)), 0, -1):
        if tuple(words[:length]) in _KNOWN:
            return " ".join(words[:length])
    return OTHER_TYPE


def answer_type(answers: Sequence[str]) -> str:
    """ "yes/no", "number" or "other", by the commonest of a question's answers; "other" without any."""
    if not answers:
        return "other"
    commonest = Counter(normalize_vqa_answer(answer) for answer in answers).most_common(1)[0][0]
    if commonest in ("yes", "no"):
        return "yes/no"
    return "number" if _NUMBER.fullmatch(commonest) else "other"
