"""Callbacks of transformers' kind: when they are called, what they see, and what they can ask for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from frozenprefix.errors import ConfigError
from frozenprefix.training import Callbacks, train, train_recipe
from frozenprefix.training.tracking import read_log
from tests.helpers.training import assert_same_tensors, losses_of

EVENTS = ("train_begin", "step_begin", "step_end", "log", "evaluate", "save", "train_end")


class Recorder(TrainerCallback):
    """Notes every event with its step."""

    def __init__(self):
        self.events, self.values = [], {}
        for event in EVENTS:
            setattr(self, f"on_{event}", self._noting(event))

    def _noting(self, event):
        def note(args, state, control, **kwargs):
            self.events.append((event, state.global_step))
            self.values[event] = (args, state, kwargs)

        return note


class Asking(TrainerCallback):
    """Asks for one thing after one step."""

    def __init__(self, switch, step):
        self.switch, self.step = switch, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            setattr(control, self.switch, True)
        return control


def test_events_come_in_transformers_order(tiny_recipe, tmp_path):
    recorder = Recorder()
    recipe = tiny_recipe(tmp_path / "run", "training.max_steps=3", "training.log_every=2")
    train(recipe, callbacks=[recorder])
    assert recorder.events == [
        ("train_begin", 0),
        ("log", 0),  # the validation before the first step
        ("evaluate", 0),
        *(("step_begin", 0), ("step_end", 1)),
        *(("step_begin", 1), ("step_end", 2), ("log", 2)),
        *(("step_begin", 2), ("step_end", 3), ("log", 3), ("evaluate", 3), ("save", 3), ("save", 3)),
        ("train_end", 3),
    ]


def test_they_see_the_recipe_the_model_and_how_far_it_is(tiny_recipe, tmp_path):
    recorder = Recorder()
    recipe = tiny_recipe(tmp_path / "run")
    train(recipe, callbacks=[recorder])
    args, state, kwargs = recorder.values["train_end"]
    assert args.training.max_steps == state.max_steps == state.global_step == 6
    assert state.is_world_process_zero
    assert state.best_model_checkpoint == str(tmp_path / "run" / "best")
    assert kwargs["model"].mapper is not None
    assert kwargs["processing_class"].tokenizer is not None
    assert kwargs["optimizer"].param_groups
    metrics = recorder.values["evaluate"][2]["metrics"]
    rows = read_log(tmp_path / "run")
    assert {"step": 6, **metrics} in rows
    assert [row["loss"] for row in state.log_history if "loss" in row] == losses_of(tmp_path / "run")


def test_a_callback_ends_the_run_and_it_can_be_resumed(tiny_recipe, tmp_path):
    recipe = tiny_recipe(tmp_path / "stopped")
    stopped = train(recipe, callbacks=[Asking("should_training_stop", 4)])
    assert stopped.steps == 4
    assert (stopped.best / "model.safetensors").is_file()
    assert train(recipe).steps == 6  # the same command without the callback
    whole = train(tiny_recipe(tmp_path / "whole"))
    assert_same_tensors(tmp_path / "stopped/last/model.safetensors", whole.output_dir / "last/model.safetensors")


@pytest.mark.parametrize(
    ("switch", "expected"),
    [("should_evaluate", ("evaluate", 1)), ("should_save", ("save", 1)), ("should_log", ("log", 1))],
)
def test_a_callback_asks_for_something_once(tiny_recipe, tmp_path, switch, expected):
    recorder = Recorder()
    seldom = ("training.log_every=100", "training.validate_every=100", "training.save_every=100")
    train(tiny_recipe(tmp_path / "run", "training.max_steps=3", *seldom), callbacks=[Asking(switch, 1), recorder])
    assert expected in recorder.events
    assert (expected[0], 2) not in recorder.events


def test_what_one_process_asks_for_all_do():
    """The other process asks for a log, and has ended the training."""
    trainer = SimpleNamespace(
        all_of=lambda mine: [mine, True if isinstance(mine, bool) else [True, False, False]],
        progress=SimpleNamespace(step=1, best_value=None, best_step=0),
        settings=SimpleNamespace(images_per_step=4),
        accelerator=SimpleNamespace(is_main_process=False, is_local_main_process=False),
        **dict.fromkeys(("model", "processor", "optimizer", "recipe"), None),
        train_groups=[None] * 8,
        total_steps=2,
    )
    callbacks = Callbacks([Asking("should_save", 1)])
    agreed = callbacks.end_step(trainer)
    assert (agreed.should_log, agreed.should_evaluate, agreed.should_save) == (True, False, True)
    assert not callbacks.control.should_save
    assert callbacks.state.epoch == 0.5
    assert callbacks.stopped(trainer)


def test_a_run_without_callbacks_learns_the_same(tiny_recipe, tmp_path):
    train(tiny_recipe(tmp_path / "with"), callbacks=[Recorder()])
    train_recipe(tiny_recipe(tmp_path / "without"))
    assert_same_tensors(tmp_path / "with/last/model.safetensors", tmp_path / "without/last/model.safetensors")


def test_what_is_no_callback_is_refused_before_anything_is_written(tiny_recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"callbacks\.1: got function, expected an object or a class of transformers"):
        train(tiny_recipe(tmp_path / "run"), callbacks=[Recorder, lambda: None])
    assert not (tmp_path / "run").exists()
