"""What several files of training tests share: reading logs, comparing checkpoints, runs in another process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from frozenprefix.config import Recipe
from frozenprefix.models.freezing import hash_tensors
from frozenprefix.training.base_trainer import BaseTrainer
from frozenprefix.training.result import TrainingResult
from frozenprefix.training.tracking import read_log
from frozenprefix.training.trainer import Trainer
from tests.helpers import ROOT
from tests.helpers.freezing import frozen_tensors

# Trains a recipe by plain gradient descent, as the fixture `plain_descent` does in the process of the tests.
PLAIN_DESCENT = """
import sys
import torch
torch.optim.AdamW = lambda parameters, lr, **_: torch.optim.SGD(parameters, lr)
from frozenprefix.config import load_recipe
from frozenprefix.training import train
train(load_recipe(sys.argv[1]))
"""


def started(recipe: Recipe) -> Trainer:
    """A trainer that is ready for its first step."""
    trainer = Trainer(recipe)
    trainer.setup()
    trainer.model.train()
    return trainer


def losses_of(folder: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in read_log(folder) if name in row]


def untimed_rows(folder: Path) -> list[dict]:
    """The rows of a run's log without what depends on the clock."""
    timed = ("targets_per_s", "data_wait_share", "seconds", "memory_gb")
    return [{name: value for name, value in row.items() if name not in timed} for row in read_log(folder)]


def assert_same_tensors(one: Path, other: Path, **tolerance: float) -> None:
    before, after = load_file(one), load_file(other)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if tolerance:
            torch.testing.assert_close(
                after[name], tensor, rtol=0, **tolerance, msg=lambda text, n=name: f"{n}: {text}"
            )
        else:
            assert torch.equal(after[name], tensor), name


def run_with_hashes(trainer: BaseTrainer) -> tuple[TrainingResult, list[str]]:
    """Run a trainer; the hashes of its frozen tensors after they were built, and at the end."""
    hashes = []
    build = trainer.build_model

    def build_and_hash() -> None:
        build()
        hashes.append(hash_tensors(frozen_tensors(trainer.model)))

    trainer.build_model = build_and_hash
    result = trainer.run("auto")
    return result, [*hashes, hash_tensors(frozen_tensors(trainer.model))]


def free_port() -> str:
    """A port that no process uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "FROZENPREFIX_DEBUG": "1", **environment}
    return subprocess.run([sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
