"""One form for everything that is left out, changed, joined or cut."""

from __future__ import annotations

import ast
import logging
import re

import pytest

from frozenprefix.errors import DataError
from frozenprefix.utils import report, report_left_out, summary
from tests.helpers import ROOT

FORM = r"^.+: \d+ of \d+ [a-z ]+ are (left out|changed|joined|cut): .+ \d+"
OTHER_WORDS = re.compile(
    r"left out|skipp|ignored|dropped|joined|discarded|\bcut\b|replaced by|passed over", re.IGNORECASE
)


def test_the_form():
    line = summary("a.tsv", 9, {"missing": 1, "empty": 2, "none": 0}, done="joined", examples=["1", "2"])
    assert line == "a.tsv: 3 of 9 rows are joined: empty 2, missing 1 (1, 2)"
    assert re.match(FORM, line)


def test_nothing_is_said_of_nothing(caplog):
    with caplog.at_level(logging.DEBUG):
        report("a", 9, {"missing": 0})
        report_left_out("a", 0, {})
    assert not caplog.messages


def test_nothing_left_is_an_error():
    with pytest.raises(DataError, match=r"a: all of its 2 images are left out \(missing 2\)"):
        report_left_out("a", 2, {"missing": 2}, what="images")


def messages_of(tree: ast.AST):
    """Line and text of every message that is logged or printed by hand."""
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        owner = getattr(call.func.value, "id", "")
        if owner in ("log", "logger", "typer", "warnings", "console"):
            for part in ast.walk(call):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield call.lineno, part.value


def test_no_other_words_are_used_anywhere():
    by_hand = []
    for path in sorted((ROOT / "frozenprefix").rglob("*.py")):
        if path.name == "reports.py":
            continue
        for line, text in messages_of(ast.parse(path.read_text(encoding="utf-8"))):
            if OTHER_WORDS.search(text):
                by_hand.append(f"{path.relative_to(ROOT)}:{line}: {text}")
    allowed = ("left out, ",)  # the image behind each count, on the screen
    assert [text for text in by_hand if not text.partition(": ")[2].startswith(allowed)] == []
