"""A checkpoint of a short run, with its recipe, and a studio around it."""

from __future__ import annotations

import pytest

from frozenprefix.demo import Corrections, DemoModel, Session, Studio
from frozenprefix.inference import Captioner
from frozenprefix.training import train


@pytest.fixture(scope="session")
def run_checkpoint(tiny_recipe, sharp_lm, tmp_path_factory):
    """`best` of a run of two steps."""
    return train(tiny_recipe(tmp_path_factory.mktemp("run"), "training.max_steps=2", lm=sharp_lm), resume="never").best


@pytest.fixture(scope="module")
def demo_model(run_checkpoint) -> DemoModel:
    return DemoModel(run_checkpoint, Captioner.from_pretrained(run_checkpoint, device="cpu", precision="fp32"))


@pytest.fixture
def session(demo_model, tmp_path) -> Session:
    """A session with one model, without files."""
    return Session(Studio([demo_model], Corrections(tmp_path / "corrections")))


@pytest.fixture
def photo(shapes):
    return shapes / "images" / "red_circle.png"
