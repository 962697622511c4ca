"""The log of a run: lines, resuming, damaged files, and trackers that are not installed."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import numpy as np
import pytest

from frozenprefix.config.sections import TrackingSection
from frozenprefix.errors import TrainingError
from frozenprefix.training.tracking import Tracker, read_log
from tests.helpers.training import run_python


def write_steps(folder, steps, **options):
    with Tracker(folder, **options) as tracker:
        for step in steps:
            tracker.log(step, {"loss": step / 2})


def steps_in(folder):
    return [row["step"] for row in read_log(folder)]


def test_one_object_a_line_written_at_once(tmp_path):
    tracker = Tracker(tmp_path / "run")
    tracker.log(1, {"loss": np.float32(0.5), "targets": 48, "split": "train"})
    text = (tmp_path / "run" / "log.jsonl").read_text()
    assert text == '{"step": 1, "loss": 0.5, "targets": 48, "split": "train"}\n'


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    with Tracker(tmp_path) as tracker:
        tracker.log(1, {"loss": float("nan"), "norm": float("inf")})
    refuse = {"parse_constant": lambda word: pytest.fail(f"{word} is not JSON")}
    assert json.loads((tmp_path / "log.jsonl").read_text(), **refuse) == {"step": 1, "loss": "nan", "norm": "inf"}


def test_a_value_that_is_no_figure_is_refused(tmp_path):
    with Tracker(tmp_path) as tracker, pytest.raises(TrainingError, match="log value: got object, expected a number"):
        tracker.log(1, {"loss": object()})


def test_resume_drops_later_lines(tmp_path):
    write_steps(tmp_path, [0, 10, 20, 30])
    write_steps(tmp_path, [30, 40], resume_step=20)
    assert steps_in(tmp_path) == [0, 10, 20, 30, 40]


def test_a_new_run_starts_a_new_log(tmp_path):
    write_steps(tmp_path, [0, 10])
    write_steps(tmp_path, [0])
    assert steps_in(tmp_path) == [0]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path, caplog):
    write_steps(tmp_path, [10, 20])
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    assert steps_in(tmp_path) == [10, 20]
    assert "log.jsonl: 1 of 3 lines are left out: cut off in writing 1" in caplog.text
    write_steps(tmp_path, [30], resume_step=20)
    assert steps_in(tmp_path) == [10, 20, 30]


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', "not json"])
def test_a_damaged_line_in_the_middle_is_an_error(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(
        TrainingError, match=r"log\.jsonl:2: .*expected (a JSON object with a step|one object a line); repair"
    ):
        Tracker(tmp_path, resume_step=2)


def test_no_log(tmp_path):
    with pytest.raises(TrainingError, match="no such log"):
        read_log(tmp_path)


def test_other_processes_write_nothing(tmp_path):
    tracker = Tracker(tmp_path / "run", TrackingSection(tensorboard=True), enabled=False)
    tracker.log(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_trackers_are_off_unless_asked_for(tmp_path):
    write_steps(tmp_path, [1])
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(tmp_path, TrackingSection(tensorboard=True)) as tracker:
        tracker.log(3, {"loss": 0.25, "note": "text"})
        tracker.log(4, {"validation/captions": ["a dog"], "validation/caption_images": ["photos/1.jpg"]})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("validation/captions/text_summary")
    assert (text.step, text.tensor_proto.string_val) == (4, [b"- 1.jpg: a dog"])
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.25)]


@pytest.mark.parametrize(
    ("option", "module", "extra"),
    [
        ("tensorboard", "torch.utils.tensorboard", "track"),
        ("wandb", "wandb", "wandb"),
        ("trackio", "trackio", "trackio"),
    ],
)
def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch, option, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TrainingError, match=rf"tracking\.{option}: .*pip install 'frozenprefix\[{extra}\]'"):
        Tracker(tmp_path, TrackingSection(**{option: True}))


class FakeLibrary(ModuleType):
    """A module whose `init` gives a run; every call is recorded."""

    def __init__(self, name: str):
        super().__init__(name)
        self.calls: list[tuple] = []

    def init(self, **options):
        self.calls.append(("init", options))
        return self

    def log(self, values, step):
        self.calls.append(("log", values, step))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def library(monkeypatch):
    """`library("wandb")` -> a module of that name that can be imported."""

    def make(name: str) -> FakeLibrary:
        module = FakeLibrary(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return make


def test_wandb_goes_on_in_the_same_run(tmp_path, library):
    wandb = library("wandb")
    for resume_step in (0, 4, 0):
        with Tracker(tmp_path, TrackingSection(wandb=True), resume_step=resume_step, config={"seed": 1}) as tracker:
            tracker.log(resume_step + 1, {"loss": 0.5, "note": "text"})
    starts = [call[1] for call in wandb.calls if call[0] == "init"]
    assert starts[0]["id"] == starts[1]["id"] != starts[2]["id"]
    assert {(start["project"], start["name"], start["config"]["seed"]) for start in starts} == {
        ("frozenprefix", tmp_path.name, 1)
    }
    assert wandb.calls.count(("finish",)) == 3
    assert ("log", {"loss": 0.5}, 5) in wandb.calls


def test_trackio_goes_on_in_the_run_of_the_same_name(tmp_path, library):
    trackio = library("trackio")
    for resume_step in (0, 4):
        with Tracker(tmp_path, TrackingSection(trackio=True), resume_step=resume_step) as tracker:
            tracker.log(resume_step + 1, {"loss": 0.5, "note": "text"})
    starts = [call[1] for call in trackio.calls if call[0] == "init"]
    assert [(start["name"], start["resume"]) for start in starts] == [
        (tmp_path.name, "never"),
        (tmp_path.name, "allow"),
    ]
    assert [call for call in trackio.calls if call[0] == "log"] == [
        ("log", {"loss": 0.5}, 1),
        ("log", {"loss": 0.5}, 5),
    ]


def test_trackio_itself_keeps_steps_of_a_resumed_run(tmp_path):
    """In another process: trackio reads its folder once, and accelerate's trackers need its state."""
    pytest.importorskip("trackio", reason="needs the extra trackio, as make test-demo has")
    script = """
import sys
from accelerate import PartialState
from frozenprefix.config.sections import TrackingSection
from frozenprefix.training.tracking import Tracker
PartialState()
for resume_step in (0, 2):
    with Tracker(sys.argv[1], TrackingSection(trackio=True), resume_step=resume_step, config={"seed": 1}) as tracker:
        for step in (resume_step + 1, resume_step + 2):
            tracker.log(step, {"loss": step / 2, "validation/captions": ["a dog"]})
"""
    environment = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    done = run_python("-c", script, str(tmp_path / "run"), **environment)
    assert done.returncode == 0, done.stderr
    named = ("--project", "frozenprefix", "--run", "run", "--metric", "loss", "--json")
    read = run_python("-m", "trackio.cli", "get", "metric", *named, **environment)
    assert read.returncode == 0, read.stderr
    values = json.loads(read.stdout[read.stdout.index("{") :])["values"]
    assert [(value["step"], value["value"]) for value in values] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
