"""Evaluations that were killed, that several processes share, and that read the feature cache."""

from __future__ import annotations

import threading

import pytest

from frozenprefix.errors import ConfigError
from frozenprefix.evaluation import EvaluationOptions, evaluate_samples
from frozenprefix.evaluation.tasks import evaluate_vqa, runs
from tests.helpers.answers import ids_of
from tests.helpers.data import rows_of
from tests.helpers.processes import run_in_threads

SETTINGS = {"num_beams": 1, "max_new_tokens": 4}


# ── killed and started again ──


class Killed(Exception):
    pass


@pytest.fixture
def killed_after(monkeypatch):
    """`killed_after(2)`: the third batch never comes. Returns the list of the samples asked for."""
    predict = runs.predict

    def install(batches: int = 10**6) -> list[tuple[str, str]]:
        asked: list[tuple[str, str]] = []
        left = iter(range(batches))

        def guarded(captioner, batch, images, settings):
            if next(left, None) is None:
                raise Killed
            asked.extend(ids_of(batch))
            return predict(captioner, batch, images, settings)

        monkeypatch.setattr(runs, "predict", guarded)
        return asked

    return install


def test_a_killed_evaluation_goes_on_where_it_was(captioner, questions, tmp_path, killed_after):
    expected = evaluate_samples(captioner, questions, predictions=tmp_path / "whole.jsonl", **SETTINGS)
    path = tmp_path / "p.jsonl"
    before = killed_after(2)
    with pytest.raises(Killed):
        evaluate_samples(captioner, questions, predictions=path, **SETTINGS)
    assert len(before) == 16, "four images with two questions each, for the model and for shuffled images"
    assert not path.exists()
    steps: list[tuple[int, int]] = []
    after = killed_after()
    result = evaluate_samples(
        captioner, questions, predictions=path, progress=lambda *step: steps.append(step), **SETTINGS
    )
    assert sorted(before + after) == sorted(set(before + after))
    assert {run for run, _ in after} == {"blind"}
    assert steps == [(24, 24)]
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert {**result, "predictions": ""} == {**expected, "predictions": ""}


def test_a_line_that_was_cut_is_predicted_again(captioner, questions, tmp_path, killed_after):
    path = tmp_path / "p.jsonl"
    killed_after(1)
    with pytest.raises(Killed):
        evaluate_samples(captioner, questions, predictions=path, **SETTINGS)
    part = tmp_path / "p.jsonl.part-r00"
    part.write_text(part.read_text()[:-5])
    again = killed_after(1)
    with pytest.raises(Killed):
        evaluate_samples(captioner, questions, predictions=path, **SETTINGS)
    rest = killed_after()
    evaluate_samples(captioner, questions, predictions=path, **SETTINGS)
    assert len(again) + len(rest) == 24 - 11, "of twelve predictions the last one was cut"
    assert len(rows_of(path)) == 8


def test_other_settings_are_refused_until_restarted(captioner, questions, tmp_path, killed_after):
    path = tmp_path / "p.jsonl"
    killed_after(1)
    with pytest.raises(Killed):
        evaluate_samples(captioner, questions, predictions=path, **SETTINGS)
    killed_after()
    with pytest.raises(ConfigError, match=r"num_beams: an evaluation was begun with 1 .* this one has 2; .*--restart"):
        evaluate_samples(captioner, questions, predictions=path, **{**SETTINGS, "num_beams": 2})
    with pytest.raises(ConfigError, match="number of samples: an evaluation was begun with 8"):
        evaluate_samples(captioner, questions[:6], predictions=path, **SETTINGS)
    asked = killed_after()
    evaluate_samples(captioner, questions, predictions=path, restart=True, **SETTINGS)
    assert len(asked) == 24


def test_other_weights_are_refused(captioner, questions, tmp_path, killed_after):
    killed_after(1)
    with pytest.raises(Killed):
        evaluate_samples(captioner, questions, predictions=tmp_path / "p.jsonl", **SETTINGS)
    weight = next(captioner.model.mapper.parameters())
    before = weight.detach().clone()
    killed_after()
    try:
        weight.data += 1
        with pytest.raises(ConfigError, match="model: an evaluation was begun with"):
            evaluate_samples(captioner, questions, predictions=tmp_path / "p.jsonl", **SETTINGS)
    finally:
        weight.data.copy_(before)


# ── several processes ──


def test_processes_share_the_samples_and_count_none_twice(captioner, questions, tmp_path, monkeypatch):
    """Four images in batches of 3 for 2 processes: uneven shares."""
    alone = evaluate_samples(captioner, questions, predictions=tmp_path / "alone.jsonl", **SETTINGS)
    lock, asked, predict = threading.Lock(), [], runs.predict

    def one_at_a_time(captioner, batch, images, settings):
        with lock:  # the threads share the model
            who = threading.current_thread().name
            asked.extend((*asker, who) for asker in ids_of(batch))
            return predict(captioner, batch, images, settings)

    monkeypatch.setattr(runs, "predict", one_at_a_time)
    path = tmp_path / "shared.jsonl"
    results = run_in_threads(
        2,
        lambda processes: evaluate_vqa(
            captioner, questions, EvaluationOptions(predictions=path, processes=processes, **SETTINGS)
        ),
        monkeypatch,
    )
    assert len(asked) == len({pair[:2] for pair in asked}) == 24
    assert len({who for *_, who in asked}) == 2
    assert {**results[0], "predictions": ""} == {**alone, "predictions": ""}
    assert results[1] == results[0]
    assert path.read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.part-*"))
