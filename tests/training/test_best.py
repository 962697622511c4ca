"""A run that ends in good order leaves a best checkpoint, however it ends, and says where it comes from."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from frozenprefix.cli.main import app
from frozenprefix.inference import Captioner, Embedder
from frozenprefix.training.contrastive import ContrastiveTrainer, train_contrastive
from frozenprefix.training.trainer import Trainer, train
from tests.helpers.contrastive import contrastive_recipe
from tests.helpers.recipes import tiny_recipe_dict
from tests.helpers.training import assert_same_tensors

LOSSES = "frozenprefix.training.trainer.validation_losses"
NO_TIME = "training.max_minutes=0.0000001"
UNCHOSEN = "no validation has chosen the best checkpoint; 'best' is the same as 'last'"


@pytest.fixture(scope="module")
def recipe_of(tiny_recipe, sharp_lm):
    return lambda folder, *overrides: tiny_recipe(folder, *overrides, lm=sharp_lm)


def check_best(result, steps: int) -> None:
    assert result.steps == steps
    assert result.best.is_dir()
    assert_same_tensors(result.best / "model.safetensors", result.output_dir / "last" / "model.safetensors")
    assert Captioner.from_pretrained(result.best).processor.prefix_length == 2


@pytest.mark.parametrize("validation", [True, False])
def test_out_of_time_before_the_first_step(recipe_of, tmp_path, caplog, validation):
    overrides = [NO_TIME, *([] if validation else ["data.validation=[]"])]
    result = train(recipe_of(tmp_path, *overrides))
    check_best(result, steps=0)
    assert result.best_value is None
    assert (f"step 0: {UNCHOSEN}" in caplog.text) == validation


def test_fewer_steps_than_validate_every(recipe_of, tmp_path):
    result = train(recipe_of(tmp_path, "training.max_steps=2", "training.validate_every=100"))
    check_best(result, steps=2)
    assert result.best_value is not None


def test_without_validation_data_the_last_is_the_best(recipe_of, tmp_path):
    check_best(train(recipe_of(tmp_path, "data.validation=[]", "training.validate_every=4")), steps=6)


def test_the_best_of_an_earlier_run_is_not_taken_for_that_of_this_one(recipe_of, tmp_path):
    train(recipe_of(tmp_path, "training.max_steps=3"))
    check_best(train(recipe_of(tmp_path, NO_TIME, "seed=5"), resume="never"), steps=0)


def test_early_stopping_keeps_the_best_of_before(recipe_of, tmp_path, monkeypatch):
    losses = iter([1.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr(LOSSES, lambda *_: {"loss": next(losses), "shuffled_loss": 9.0})
    settings = ("training.max_steps=20", "training.validate_every=1", "training.early_stopping_patience=1")
    result = train(recipe_of(tmp_path, *settings))
    assert (result.steps, result.best_value) == (2, 3.0)
    state = json.loads((tmp_path / "last" / "training_state.json").read_text())
    assert state["best_step"] == 1
    assert result.best.is_dir()


def test_a_validation_that_is_no_number_is_never_the_best(recipe_of, tmp_path, monkeypatch, caplog):
    losses = iter([1.0, float("nan"), 3.0, float("nan")])
    monkeypatch.setattr(LOSSES, lambda *_: {"loss": next(losses), "shuffled_loss": 9.0})
    result = train(recipe_of(tmp_path, "training.max_steps=3", "training.validate_every=1"))
    assert result.best_value == 3.0
    assert "step 1: validation loss is nan, never the best" in caplog.text


def test_validations_without_any_number_leave_the_last(recipe_of, tmp_path, monkeypatch, caplog):
    nan = {"loss": float("nan"), "shuffled_loss": 9.0}
    monkeypatch.setattr(LOSSES, lambda *_: nan)
    check_best(train(recipe_of(tmp_path, "training.max_steps=3")), steps=3)
    assert f"step 3: {UNCHOSEN}" in caplog.text


def test_a_finished_run_whose_best_was_deleted(recipe_of, tmp_path, caplog):
    recipe = recipe_of(tmp_path, "training.max_steps=3")
    shutil.rmtree(train(recipe).best)
    check_best(train(recipe), steps=3)
    assert "step 3: the best checkpoint is gone; 'best' is the same as 'last'" in caplog.text


def test_a_run_that_chose_its_best_keeps_it(recipe_of, tmp_path, monkeypatch, caplog):
    losses = iter([1.0, 3.0, 4.0])
    monkeypatch.setattr(LOSSES, lambda *_: {"loss": next(losses), "shuffled_loss": 9.0})
    trainer = Trainer(recipe_of(tmp_path))
    result = trainer.run()
    assert result.best_value == 3.0
    assert "is the same as 'last'" not in caplog.text
    with pytest.raises(AssertionError):
        assert_same_tensors(result.best / "model.safetensors", tmp_path / "last" / "model.safetensors")


def test_the_command_names_a_best_that_is_there(tiny_lm, shapes, tmp_path):
    (tmp_path / "r.yaml").write_text(json.dumps(tiny_recipe_dict(tiny_lm("llama"), shapes, tmp_path / "run")))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "r.yaml"), NO_TIME])
    assert result.exit_code == 0, result.output
    assert f"best checkpoint: {tmp_path / 'run' / 'best'}" in result.output
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([NO_TIME], 0),
        (["training.max_steps=1", "training.validate_every=50"], 1),
        (["training.max_steps=1", "data.validation=[]"], 1),
    ],
)
def test_contrastive_runs(tiny_bert, shapes, tmp_path, overrides, steps):
    result = train_contrastive(contrastive_recipe(tiny_bert, shapes, tmp_path, *overrides))
    assert result.steps == steps
    assert_same_tensors(result.best / "model.safetensors", tmp_path / "last" / "model.safetensors")
    assert Embedder.from_pretrained(result.best).embed_texts(["a dog"]).shape[0] == 1


def test_a_contrastive_validation_that_is_no_number(tiny_bert, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(ContrastiveTrainer, "best_of", lambda self, values: ("recall@10", float("nan")))
    result = train_contrastive(contrastive_recipe(tiny_bert, shapes, tmp_path, "training.max_steps=1"))
    assert (result.best / "model.safetensors").is_file()
    assert torch.isfinite(torch.tensor(result.seconds))
