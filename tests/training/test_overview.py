"""The table at the start of a run, and the share of time that waits for data."""

from __future__ import annotations

import logging
import time

import pytest

from frozenprefix.training.overview import overview, part_rows
from frozenprefix.training.pace import Pace
from frozenprefix.training.trainer import Trainer

LORA = "model.language_model.peft={type: lora, r: 2, target_modules: [q_proj]}"


def test_parts_rates_and_files(tiny_recipe, tmp_path, caplog):
    trainer = Trainer(tiny_recipe(tmp_path, LORA, "training.learning_rates={language_model: 0.0001}"))
    with caplog.at_level(logging.INFO):
        trainer.setup()
    rows = {row.part: row for row in part_rows(trainer.model, trainer.optimizer)}
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in trainer.model.parameters())
    assert rows["vision_encoder"].cells()[2:4] == ("–", "–")
    assert rows["mapper"].rates == (trainer.settings.learning_rate,)
    assert rows["language_model"].rates == (1e-4,)
    assert rows["language_model"].saved_in == "language_adapter/"
    assert rows["mapper"].saved_in == "model.safetensors"
    trainer.write_model(tmp_path / "model")
    assert (tmp_path / "model/language_adapter").is_dir()
    assert overview(trainer.model, trainer.optimizer, trainer.output_dir) in caplog.messages


def slow(seconds):
    for number in range(10):
        time.sleep(seconds)
        yield number


@pytest.mark.parametrize(("cached", "advice"), [(False, "raise data.workers (now 2)"), (True, "on a local disk")])
def test_waiting_is_measured_and_said_once(caplog, cached, advice):
    pace = Pace(steps=3)
    batches = pace.watch(slow(0.01))
    for step in range(5):
        next(batches)
        pace.end_step(loss=float(step), targets=4, seconds=0.02)
        pace.warn_if_waiting(step, workers=2, cached=cached)
    assert 0.4 < pace.wait_share <= 1.0
    (message,) = caplog.messages
    assert message.startswith("step 2: ")
    assert advice in message


def test_a_quick_supply_is_not_mentioned(caplog):
    pace = Pace(steps=2)
    batches = pace.watch(range(10))
    for step in range(5):
        next(batches)
        pace.end_step(loss=float(step), targets=4, seconds=1.0)
        pace.warn_if_waiting(step, workers=2, cached=False)
    assert pace.wait_share < 0.01
    assert (pace.loss, pace.targets_per_second) == (3.5, 4.0), "means of the last two steps"
    assert caplog.messages == []
