"""Progress: bars on a terminal, one inside another, and lines elsewhere."""

from __future__ import annotations

import logging

import pytest

from frozenprefix.utils import progress, progress_bar
from frozenprefix.utils.progress import ProgressLines


def test_bars_nest_and_end(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # counts as a terminal
    with progress_bar("outer") as outer:
        outer(1, 2)
        with progress_bar("inner") as inner:
            inner(3, 4, note="loss 1.0")
        outer(2, note="done")
    with progress_bar("later") as later:
        later(1)
    shown = capsys.readouterr().err
    assert all(text in shown for text in ("outer", "inner", "loss 1.0", "later"))


def test_short_work_is_not_told_without_a_terminal_and_nothing_when_hidden(monkeypatch, capsys, caplog):
    with caplog.at_level(logging.INFO), progress_bar("a") as update:
        update(1, 2)
    assert not caplog.messages
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar("b", enabled=False) as update:
        update(1, 2)
    assert capsys.readouterr().err == ""


@pytest.fixture
def told():
    """A clock that is set by hand, and (second, line) of what was said."""

    class Told(list):
        now = 0.0

        def say(self, line: str) -> None:
            self.append((self.now, line))

    return Told()


def test_a_line_every_ten_seconds_with_rate_and_time_left(told):
    lines = ProgressLines(told.say, clock=lambda: told.now)
    with lines.showing("encoding images") as update:
        for second in range(60):
            told.now = float(second)
            update(2 * second, 400, note="now")
    assert [when for when, _ in told] == [10.0, 20.0, 30.0, 40.0, 50.0, 59.0]
    assert told[0][1] == "encoding images: 20 of 400, 10 s, 2/s, 190 s left  now"
    assert told[-1][1] == "encoding images: done, 59 s"


def test_work_without_news_is_told_of_as_well_and_the_innermost_first(told):
    lines = ProgressLines(told.say, clock=lambda: told.now)
    with lines.showing("training") as update:
        update(3, 10)
        with lines.showing("validating"):
            for second in range(1, 31):
                told.now = float(second)
                lines.tick()
        told.now = 45.0
        update(4)
    assert [line for _, line in told] == [
        "validating: 10 s",
        "validating: 20 s",
        "validating: 30 s",
        "validating: done, 30 s",
        "training: 4 of 10, 45 s, 0.0222/s, 270 s left",
        "training: done, 45 s",
    ]


def test_lines_go_on_while_the_work_reports_nothing(monkeypatch, caplog):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    waited = progress.threading.Event()
    monkeypatch.setattr(ProgressLines, "tick", lambda self, now=None: waited.set())
    with caplog.at_level(logging.INFO), progress_bar("loading"):
        assert waited.wait(30)
    assert caplog.messages == ["loading: done, 0 s"] or caplog.messages == ["loading: done, 1 s"]


def test_a_process_that_is_not_the_first_shows_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar("c") as update:
        update(1, 2)
    assert capsys.readouterr().err == ""
