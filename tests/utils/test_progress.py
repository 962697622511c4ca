"""Progress bars on a terminal, one inside another."""

from __future__ import annotations

from frozenprefix.utils import progress_bar


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


def test_nothing_is_shown_without_a_terminal_or_when_hidden(monkeypatch, capsys):
    with progress_bar("a") as update:
        update(1, 2)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar("b", enabled=False) as update:
        update(1, 2)
    assert capsys.readouterr().err == ""
