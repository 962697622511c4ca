"""Penn Treebank tokens of English captions without Java.

The caption metrics of MS COCO (Chen et al. 2015, "Microsoft COCO Captions", section 3) are defined over the tokens of
Stanford CoreNLP 3.4.1's PTBTokenizer, lower-cased, with punctuation removed. `ptb_tokenize` gives the same tokens.

One difference is on purpose: the Java tokenizer reads all captions as one text, so that a caption ending in a single
letter and a period ("letter P.") or in "no." is cut differently depending on how the *next* caption begins. Here a
caption is tokenised on its own.
"""

from __future__ import annotations

import re
from functools import cache

from frozenprefix.evaluation.metrics.ptb_rules import SPLIT_WORDS, build_rules

# The bracket names that pycocoevalcap also lists are upper case there and so never match: "-lrb-" stays a token.
PUNCTUATION = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", ";", "-", "--", "..."))

_PLAIN_WORD = re.compile(r"[A-Za-z]+(?=\s)")
_SPACE = re.compile(r"[\s\u0085\u200b\ufeff]+")
_QUOTE_PAIR = re.compile("[`\u0091-\u0094\u2018-\u201f\u2039\u203a\u00ab\u00bb]{2}")
_CONTRACTION = re.compile("(n?)(?:['\u0092\u2019]|&apos;)(s|m|d|ll|re|ve|t)")
_ROUND_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-"})
_SPELLED = {
    **{"[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **dict.fromkeys("\u0091\u2018\u201b\u2039", "`"),
    **dict.fromkeys("\u0092\u2019\u203a", "'"),
    **dict.fromkeys('"\u0093\u201c\u00ab', "``"),
    **dict.fromkeys("\u0094\u201d\u00bb", "''"),
    **dict.fromkeys(
        ["\u0096", "\u0097", "\u2013", "\u2014", "\u2015", "---", "----", "&md;", "&mdash;", "&ndash;"], "--"
    ),
    **dict.fromkeys("\u0080\u00a4\u20a0\u20ac", "$"),
    **{"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"},
    **{"\u00a2": "cents", "\u00a3": "#", "\u2026": "...", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'"},
    **{"&nbsp;": "", "&amp;": "&"},
}


def ptb_tokenize(text: str) -> list[str]:
    """Return the lower-case Penn Treebank tokens of a caption, punctuation removed.

    Equal to pycocoevalcap's `PTBTokenizer` on ordinary English; see the module's text for the one exception. A few
    tokens contain a no-break space, as there: "3 1/2", "(555) 555-1234".

    Example:
        >>> ptb_tokenize("A dog's ball, on the grass.")
        ['a', 'dog', "'s", 'ball', 'on', 'the', 'grass']
    """
    return [token for token in _lex(text.replace("\n", " ") + "\n\n") if token and token not in PUNCTUATION]


def _lex(text: str) -> list[str]:
    """Return all tokens of `text`, which must end in two line ends: some rules look two characters ahead."""
    tokens: list[str] = []
    at = 0
    while at < len(text):
        if space := _SPACE.match(text, at):
            at = space.end()
        elif (plain := _PLAIN_WORD.match(text, at)) and plain[0].lower() not in SPLIT_WORDS:
            tokens.append(plain[0].lower())
            at = plain.end()
        elif token := _longest_match(text, at):
            tokens.append(_spell(token.lower()))
            at += len(token)
        else:
            at += 1
    return tokens


@cache
def _rules() -> list[re.Pattern[str]]:
    return build_rules()


def _longest_match(text: str, at: int) -> str:
    """Return the token of the rule that matches most characters at `at`, context included; "" if none does."""
    longest, token = at, ""
    for rule in _rules():
        match = rule.match(text, at)
        if match and match.end() > longest:
            longest, token = match.end(), match[1]
    return token


def _spell(token: str) -> str:
    """Return `token` as the Treebank spells it: ASCII quotes, dashes, brackets by name, no space inside."""
    if token in _SPELLED:
        return _SPELLED[token]
    if match := _CONTRACTION.fullmatch(token):
        return f"{match[1]}'{match[2]}"
    if _QUOTE_PAIR.fullmatch(token):
        return "".join(_SPELLED.get(char, char) for char in token)
    if token.startswith(".") and set(token) <= {".", " ", "\u00a0"} and len(token) > 2:
        return "..."
    if "&amp;" in token and not set(token) & {"/", "@"}:
        token = token.replace("&amp;", "&")
    token = token.translate(_ROUND_BRACKETS)
    return token.replace(" ", "\u00a0").replace("\u00ad", "") or "-"
