"""States on disk that were damaged, replaced or removed, and what a resumed run makes of them."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from frozenprefix.errors import CheckpointError
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.training.run_folder import RunFolder
from frozenprefix.training.trainer import Trainer, train
from frozenprefix.utils.sums import SUMS_FILE, write_sums
from tests.helpers.drawings import write_shapes
from tests.helpers.lm import save_tiny_lm
from tests.helpers.training import assert_same_tensors

STATES = ("training.save_every=2", "training.keep_last=2", "model.mapper.dropout=0.2")


@pytest.fixture(scope="module")
def run(tiny_recipe, tmp_path_factory) -> Path:
    """A run of 6 steps with states after steps 4 and 6; not to be written to."""
    folder = tmp_path_factory.mktemp("run")
    train(tiny_recipe(folder, *STATES))
    return folder


@pytest.fixture
def copied(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << (place % 8)
    path.write_bytes(data)


def test_earlier_states_are_kept_and_rotated(run):
    assert [state.name for state in RunFolder(run).states()] == ["last", "step-000004"]
    assert json.loads((run / "step-000004/training_state.json").read_text())["step"] == 4


def test_a_damaged_state_is_passed_over_and_named(tiny_recipe, run, copied, caplog):
    """The run goes on from the earlier state and ends where the undisturbed one did."""
    flip(copied / "last/optimizer.safetensors", 500)
    with caplog.at_level(logging.INFO):
        train(tiny_recipe(copied, *STATES))
    assert "not resumed from a later state" in caplog.text
    assert "last: optimizer.safetensors has changed since it was written" in caplog.text
    assert f"resumed from {copied / 'step-000004'} at step 4 of 6" in caplog.text
    for name in ("model", "optimizer", "random_state"):
        assert_same_tensors(run / f"last/{name}.safetensors", copied / f"last/{name}.safetensors")
    assert [state.name for state in RunFolder(copied).states()] == ["last", "step-000004"]


def test_without_a_whole_state_nothing_starts_over_by_itself(tiny_recipe, copied):
    shutil.rmtree(copied / "step-000004")
    (copied / "last/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing.*use --resume never to start over"):
        train(tiny_recipe(copied, *STATES))


def test_a_new_run_does_not_leave_states_of_the_old_one(tiny_recipe, copied):
    train(tiny_recipe(copied, *STATES, "training.max_steps=3", "training.learning_rate=0.02"), resume="never")
    assert [state.name for state in RunFolder(copied).states()] == ["last", "step-000002"]


def test_every_flipped_byte_of_a_state_is_found(copied):
    """In files that are listed the sums differ; a flip in the list itself is found or harmless."""
    rng, folder = random.Random(0), RunFolder(copied)
    for path in sorted(file for file in (copied / "last").rglob("*") if file.is_file()):
        original = path.read_bytes()
        for _ in range(4):
            flip(path, rng.randrange(len(original)))
            found = folder.find_state()
            assert found == copied / "step-000004" or path.name == SUMS_FILE, path
            path.write_bytes(original)
    assert folder.find_state() == copied / "last"


def test_weights_with_flipped_bytes_are_not_loaded(copied):
    flip(copied / "best/model.safetensors", 2000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed since it was written"):
        FrozenPrefixForConditionalGeneration.from_pretrained(copied / "best")


@pytest.mark.parametrize("tensor", [torch.nan, 1])
def test_weights_that_are_not_finite_or_integers_are_not_loaded(copied, tensor):
    path = copied / "best/model.safetensors"
    tensors = load_file(path)
    tensors["mapper.scale.norm.weight"] = torch.full((32,), tensor)
    save_file(tensors, path)
    write_sums(copied / "best")
    message = "mapper.scale.norm.weight has (values that are not finite|dtype int64, expected a floating-point one)"
    with pytest.raises(CheckpointError, match=message):
        FrozenPrefixForConditionalGeneration.from_pretrained(copied / "best")


@pytest.mark.parametrize("part", ["language_model", "vision_encoder"])
def test_a_checkpoint_without_identity_is_refused(copied, part):
    path = copied / "best/config.json"
    config = json.loads(path.read_text())
    del config["identity"][part]
    path.write_text(json.dumps(config))
    write_sums(copied / "best")
    with pytest.raises(CheckpointError, match=rf"config\.json has no identity of {part}"):
        FrozenPrefixForConditionalGeneration.from_pretrained(copied / "best")


def test_a_language_model_that_was_replaced_in_place_is_not_resumed_with(tiny_recipe, tmp_path):
    lm = save_tiny_lm(tmp_path / "lm", "llama")
    train(tiny_recipe(tmp_path / "run", "training.max_steps=2", lm=lm))
    weights = load_file(lm / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 0.01
    save_file(weights, lm / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"language_model: this checkpoint was trained with sha256="):
        train(tiny_recipe(tmp_path / "run", "training.max_steps=2", lm=lm))


@pytest.mark.parametrize("change", ["removed row", "reordered rows", "edited text", "other image"])
def test_changed_data_is_not_resumed_with(tiny_recipe, tmp_path, change):
    data = write_shapes(tmp_path / "data")
    train(tiny_recipe(tmp_path / "run", "training.max_steps=2", data=data))
    file = data / "captions.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    training = [number for number, row in enumerate(rows) if row["split"] == "train"]
    if change == "removed row":
        del rows[training[0]]
    elif change == "reordered rows":
        rows[training[0]], rows[training[1]] = rows[training[1]], rows[training[0]]
    elif change == "edited text":
        rows[training[0]]["captions"][0] += " indeed"
    else:
        shutil.copy(data / rows[training[1]]["image"], data / rows[training[0]]["image"])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(CheckpointError, match=r"belongs to a run with other data: data\.train"):
        train(tiny_recipe(tmp_path / "run", "training.max_steps=2", data=data))


def test_another_recipe_is_not_resumed_with(tiny_recipe, copied):
    with pytest.raises(CheckpointError, match=r"another recipe: training\.learning_rate was 0\.01, now 0\.5"):
        train(tiny_recipe(copied, *STATES, "training.learning_rate=0.5"))


def test_a_checkpoint_has_the_mode_of_other_files(run):
    modes = {path.stat().st_mode for path in (run / "last").rglob("*") if path.is_file()}
    (run / "new").touch()
    assert modes == {(run / "new").stat().st_mode}


def test_the_state_is_the_same_for_the_trainer_that_reads_it(tiny_recipe, copied):
    trainer = Trainer(tiny_recipe(copied, *STATES))
    trainer.setup()
    trainer.restore(str(copied / "step-000004"))
    assert trainer.progress.step == 4
