"""A mistyped checkpoint is one line, with the nearest folder's name, whoever opens it."""

from __future__ import annotations

import pytest

from frozenprefix.assets import check_checkpoint
from frozenprefix.errors import CheckpointError
from frozenprefix.evaluation import evaluate_checkpoint
from frozenprefix.inference import Captioner, Dialog, Embedder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """runs/dogs/best is a checkpoint, and the working directory is where runs/ lies."""
    folder = tmp_path / "runs" / "dogs" / "best"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "frozenprefix"}')
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "runs/dogs/bst",
            r"got 'runs/dogs/bst', expected a checkpoint folder or a Hub id \(did you mean 'runs/dogs/best'\?\)",
        ),
        ("run/dogs/best", r"\(did you mean 'runs'\?\)"),
        ("runs/dgs/best", r"\(did you mean 'runs/dogs'\?\)"),
        ("runs/dogs", r"'runs/dogs' holds no config.json \(did you mean 'runs/dogs/best'\?\)"),
        ("runs", r"'runs' holds no config.json$"),
        ("runs/dogs/best/config.json", r"got the file '.*config.json', expected a folder; try 'runs/dogs/best'"),
        ("llama", r"'llama' holds a model of type 'llama', expected 'frozenprefix' or 'locked_image_text'"),
        ("broken", r"'broken/config.json' cannot be read"),
        ("/nowhere/at/all", r"got '/nowhere/at/all', expected a checkpoint folder or a Hub id"),
        ("somebody/model", r"got 'somebody/model', expected a checkpoint folder or a Hub id"),
    ],
)
def test_mistyped_checkpoints(runs, name, message):
    for open_checkpoint in (
        check_checkpoint,
        Captioner.from_pretrained,
        Dialog.from_pretrained,
        Embedder.from_pretrained,
        lambda name: evaluate_checkpoint(name, task="caption"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(name)
        assert "\n" not in str(caught.value)


def test_right_names_pass(runs, monkeypatch):
    check_checkpoint("runs/dogs/best")
    check_checkpoint(runs / "runs" / "dogs" / "best")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    check_checkpoint("somebody/model")  # the Hub will know
