"""A run whose output is a file tells at least every 15 seconds what it does."""

from __future__ import annotations

import functools
import logging
import threading

import pytest

from frozenprefix.evaluation import evaluate_checkpoint
from frozenprefix.training import train
from frozenprefix.utils import progress, progress_bar


@pytest.fixture
def told(monkeypatch):
    """(second, line) of all that is said, by a clock that goes on by 3 seconds whenever it is read."""
    lines: list[tuple[float, str]] = []
    now, lock = [0.0], threading.Lock()

    def clock() -> float:
        with lock:
            now[0] += 3.0
            return now[0]

    say = lambda line: lines.append((now[0], line))  # noqa: E731
    monkeypatch.setattr(progress, "ProgressLines", functools.partial(progress.ProgressLines, say, clock))
    return lines


def stages(told) -> list[str]:
    """The work that the lines tell of, in order."""
    return list(dict.fromkeys(line.partition(":")[0] for _, line in told))


def assert_often(told):
    seconds = [when for when, _ in told]
    gaps = [later - earlier for earlier, later in zip([0.0, *seconds], seconds, strict=False)]
    assert max(gaps) <= 15 + 3, "and one reading of the clock"


def test_training(told, tiny_recipe, tmp_path):
    train(tiny_recipe(tmp_path / "run"), resume="never")
    assert {"encoding images", "validating", "training", "tiny"} <= set(stages(told))
    assert_often(told)


def test_evaluation(told, tiny_checkpoint, shapes, tmp_path):
    with progress_bar("predicting") as update:
        evaluate_checkpoint(
            tiny_checkpoint,
            task="vqa",
            data=shapes,
            split="val",
            num_beams=1,
            predictions=tmp_path / "p.jsonl",
            feature_cache=str(tmp_path / "cache"),
            progress=update,
        )
    assert {"encoding images", "predicting"} <= set(stages(told))
    assert_often(told)


def test_lines_are_in_the_log(tiny_checkpoint, shapes, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with caplog.at_level(logging.INFO, logger="frozenprefix"), progress_bar("predicting") as update:
        evaluate_checkpoint(
            tiny_checkpoint, task="vqa", data=shapes, split="val", predictions=tmp_path / "p.jsonl", progress=update
        )
    assert any(message.startswith("predicting: 24 of 24, ") for message in caplog.messages)
