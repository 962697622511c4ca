"""Runs that are told to stop, killed at random moments, or that cannot write."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from benchmarks.survival import Runs, run_with_kills
from frozenprefix.errors import StoppedError
from frozenprefix.training.trainer import Trainer, train
from tests.helpers import ROOT
from tests.helpers.training import assert_same_tensors, untimed_rows

# a state after every step, so that many kills come while one is written
SETTINGS = ("model.mapper.dropout=0.2", "training.max_steps=12", "training.save_every=1", "training.keep_last=2")
FILES = ("last/model.safetensors", "last/optimizer.safetensors", "last/random_state.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with Runs(tmp_path_factory.mktemp("runs") / "errors") as started:
        yield started


@pytest.fixture
def recipe_file(tiny_recipe, tmp_path):
    def make(name: str, *overrides: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(tiny_recipe(tmp_path / name, *SETTINGS, *overrides).to_yaml())
        return path

    return make


def assert_undisturbed(whole: Path, other: Path) -> None:
    for file in FILES:
        assert_same_tensors(whole / file, other / file)

    assert untimed_rows(other) == untimed_rows(whole), "no step is repeated in the log, and none is left out"


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_run_ends_as_the_undisturbed_one(runs, recipe_file, tmp_path, kills):
    whole, rng = recipe_file("whole"), random.Random(kills)
    began = time.monotonic()
    runs.run(whole)
    seconds = time.monotonic() - began
    for number, start in enumerate(range(0, kills, 3)):
        run_with_kills(runs, recipe_file(f"run-{number}"), min(3, kills - start), rng, seconds)
        assert_undisturbed(tmp_path / "whole", tmp_path / f"run-{number}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_saves_its_state_and_says_so(runs, recipe_file, tmp_path, number):
    settings = ("training.save_every=1000", "training.max_steps=2000", "training.validate_every=2000")
    recipe = recipe_file("run", *settings)
    (child,) = runs.start(recipe)
    for _ in range(600):
        if (tmp_path / "run/log.jsonl").exists() and len((tmp_path / "run/log.jsonl").read_text().splitlines()) > 3:
            break
        time.sleep(0.1)
    os.kill(child, number)
    assert runs.wait() == 75
    step = json.loads((tmp_path / "run/last/training_state.json").read_text())["step"]
    assert 0 < step < 2000
    text = " ".join(runs.errors.read_text().split())
    assert f"stopped by {number.name} after step {step} of 2000" in text


def test_a_stopped_run_goes_on_as_the_undisturbed_one(tiny_recipe, tmp_path, monkeypatch):
    train(tiny_recipe(tmp_path / "whole", *SETTINGS))
    take = Trainer.step

    def step_and_stop(self, batches):
        values = take(self, batches)
        if self.progress.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    settings = (*SETTINGS, "training.save_every=4")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step_and_stop)
        with pytest.raises(StoppedError, match="stopped by SIGTERM after step 5 of 12; the state is in"):
            train(tiny_recipe(tmp_path / "run", *settings))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(tiny_recipe(tmp_path / "run", *settings))
    assert_undisturbed(tmp_path / "whole", tmp_path / "run")


LIMITED = """
    import resource, signal, sys
    from frozenprefix.cli.main import app
    import frozenprefix.training.trainer
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    app(["train", sys.argv[2]])
"""


@pytest.mark.parametrize("limit", [200, 3000, 20_000])
def test_a_disk_that_takes_no_more_is_one_clear_error_and_harms_nothing(recipe_file, tmp_path, runs, limit):
    """A limit on the size of files stands for a full disk: the log, the config or the weights cannot be written."""
    recipe = recipe_file("run", "training.max_steps=2", "training.schedule=constant")
    runs.run(recipe)
    before = {path: path.read_bytes() for path in (tmp_path / "run/last").iterdir()}
    longer = tmp_path / "longer.yaml"
    longer.write_text(recipe.read_text().replace("max_steps: 2", "max_steps: 4"))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIMITED), str(limit), str(longer)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot write" in done.stderr
    assert {path: path.read_bytes() for path in before} == before
