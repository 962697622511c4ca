"""Training that meets bad data or a loss that is no number, that stops early; its precision and schedule."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frozenprefix.errors import ConfigError, DataError, TrainingError
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.training.diagnosis import looks_blind
from frozenprefix.training.guards import find_not_finite
from frozenprefix.training.objectives import NextToken
from frozenprefix.training.schedule import learning_rate_factor
from frozenprefix.training.setup import load_samples
from frozenprefix.training.tracking import read_log
from frozenprefix.training.trainer import train
from tests.helpers.drawings import write_shapes
from tests.helpers.training import assert_same_tensors, losses_of


@pytest.fixture(scope="module")
def recipe_of(tiny_recipe, sharp_lm):
    return lambda folder, *overrides, **options: tiny_recipe(folder, *overrides, lm=sharp_lm, **options)


# ── bad data ──


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_bad_images_are_counted_listed_and_left_out(recipe_of, tmp_path, cache):
    data = write_shapes(tmp_path / "shapes")
    (data / "images/red_circle.png").write_bytes(b"no image")
    (data / "images/blue_cross.png").unlink()
    share = "data.max_bad_share=0.2"
    result = train(recipe_of(tmp_path / "run", share, f"data.feature_cache={cache}", "training.max_steps=3", data=data))
    rows = [json.loads(line) for line in (tmp_path / "run/bad_images.jsonl").read_text().splitlines()]
    assert {(Path(row["image"]).name, row["reason"]) for row in rows} == {
        ("red_circle.png", "not_an_image"),
        ("blue_cross.png", "missing"),
    }
    assert result.steps == 3


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_too_many_bad_images_stop_the_run(recipe_of, tmp_path, cache):
    data = write_shapes(tmp_path / "shapes")
    (data / "images/red_circle.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 of 12 images are bad \(1 not_an_image\), expected at most 1\.00%"):
        train(recipe_of(tmp_path / "run", f"data.feature_cache={cache}", data=data))
    assert len((tmp_path / "run/bad_images.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "run/last").exists()


def test_a_repaired_image_leaves_the_list(recipe_of, tmp_path):
    data = write_shapes(tmp_path / "shapes")
    (tmp_path / "run").mkdir()
    row = {"image": "images/red_circle.png", "reason": "missing", "message": "images/red_circle.png: no such file"}
    (tmp_path / "run/bad_images.jsonl").write_text(json.dumps(row) + "\n")
    train(recipe_of(tmp_path / "run", "training.max_steps=1", data=data))
    assert not (tmp_path / "run/bad_images.jsonl").exists()


def test_empty_targets_are_left_out_and_counted(tmp_path, caplog):
    data = write_shapes(tmp_path / "shapes")
    path = data / "captions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["captions"], rows[1]["captions"] = ["", "a shape", " "], [" "]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.WARNING):
        samples = load_samples([{"type": "captions", "path": str(data)}], "train")
    assert len(samples) == 11
    assert samples[0].targets == ("a shape",)
    assert "data.train: 1 of 12 samples are left out: no target 1" in caplog.messages
    assert "data.train: 2 of 33 targets are left out: blank 2" in caplog.messages


def test_nothing_to_learn_is_an_error(tmp_path):
    data = write_shapes(tmp_path / "shapes")
    rows = [json.dumps({"image": "images/red_circle.png", "captions": [" "]})]
    (data / "captions.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"data\.train: all of its 1 samples are left out \(no target 1\)"):
        load_samples([{"type": "captions", "path": str(data)}], "train")


def test_no_readable_image_is_an_error(recipe_of, tmp_path):
    data = write_shapes(tmp_path / "shapes")
    for path in (data / "images").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"data\.train: not one image can be read"):
        train(recipe_of(tmp_path / "run", "data.max_bad_share=1.0", data=data))


# ── guards and stopping ──


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(recipe_of, tmp_path, monkeypatch):
    loss_of = NextToken.loss
    calls = []

    def spoiled(self, *batch):
        calls.append(1)
        loss = loss_of(self, *batch)
        return loss if len(calls) < 5 else loss * math.nan

    monkeypatch.setattr(NextToken, "loss", spoiled)
    with pytest.raises(TrainingError, match=r"step 6: loss is nan at learning rate .* lower training\.learning_rate"):
        train(recipe_of(tmp_path, "training.max_bad_steps=1"))
    assert json.loads((tmp_path / "last/training_state.json").read_text())["step"] == 3
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "last/model.safetensors").values())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_step_changes_nothing_and_names_its_samples(recipe_of, tmp_path, monkeypatch, caplog, where):
    """The first of two micro-batches of step 2 is bad: the step is left out, and the run goes on."""
    loss_of, calls = NextToken.loss, []

    def spoiled(self, *batch):
        calls.append(1)
        loss = loss_of(self, *batch)
        if len(calls) != 3:
            return loss
        return loss * math.nan if where == "loss" else loss + (loss - loss.detach()).sqrt()  # slope of infinity

    monkeypatch.setattr(NextToken, "loss", spoiled)
    train(recipe_of(tmp_path / "run", "training.gradient_accumulation_steps=2", "data.validation=[]"))
    (row,) = [row for row in read_log(tmp_path / "run") if "bad_samples" in row]
    assert row["step"] == 2
    tensors = load_file(tmp_path / "run/last/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    state = json.loads((tmp_path / "run/last/training_state.json").read_text())
    assert (state["step"], state["bad_steps"]) == (6, 0)
    assert "the step changes nothing (1 in a row, limit 3); samples: " in caplog.text
    images = {sample.rpartition("/")[2].partition(".")[0] for sample in row["bad_samples"]}
    assert len(images) == (2 if where == "loss" else 4), "of the micro-batch, or of the step"


def test_which_value_is_not_finite():
    assert find_not_finite(2.0, 300.0) is None
    assert find_not_finite(math.nan, 1.0) == "loss is nan"
    assert find_not_finite(2.0, math.inf) == "gradient norm is inf"


def test_blind_guard(recipe_of, tmp_path, monkeypatch, caplog):
    assert looks_blind(3.0, 3.005)
    assert not looks_blind(3.0, 3.2)
    monkeypatch.setattr(
        "frozenprefix.training.trainer.validation_losses", lambda *_: {"loss": 3.0, "shuffled_loss": 3.0}
    )
    with caplog.at_level(logging.WARNING):
        train(recipe_of(tmp_path))
    blind = [m for m in caplog.messages if "does not look at the image" in m]
    assert [m.split(":")[0] for m in blind] == ["step 3", "step 6"], "not before the first third of the run"
    assert all("3.000 with the right image and 3.000 with a wrong one" in m for m in blind)


def test_captions_of_validation_images_are_logged_and_compared(recipe_of, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("frozenprefix.training.sampling.generate_ids", lambda *_, **__: [[5, 6, 2]] * 4)
    train(recipe_of(tmp_path))
    rows = [row for row in read_log(tmp_path) if "validation/captions" in row]
    assert [row["step"] for row in rows] == [0, 3, 6]
    assert len(rows[0]["validation/captions"]) == 4
    assert rows[0]["validation/prefix_scale"] == pytest.approx(1.0, abs=0.05), "it starts as large as words are"
    warned = [m.split(":")[0] for m in caplog.messages if "of 4 images get the caption" in m]
    assert warned == ["step 3", "step 6"], "not before the first third of the run"


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_images_that_are_trained_on_and_validated_are_counted(recipe_of, tmp_path, caplog, cache):
    data = write_shapes(tmp_path / "shapes")
    rows = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    files = {split: [data / row["image"] for row in rows if row["split"] == split] for split in ("train", "val")}
    for train_file, validation_file in zip(files["train"][:2], files["val"][:2], strict=True):
        validation_file.write_bytes(train_file.read_bytes())
    train(recipe_of(tmp_path / "run", f"data.feature_cache={cache}", "training.max_steps=1", data=data))
    (warning,) = [m for m in caplog.messages if "data.train and data.validation" in m]
    assert warning.startswith("2 images are in both")
    assert f"{files['val'][0]} = {files['train'][0]}" in warning


def test_early_stopping(recipe_of, tmp_path, monkeypatch):
    values = iter([9.0, 5.0, 4.0, 4.5, 4.1, 1.0])
    monkeypatch.setattr(
        "frozenprefix.training.trainer.validation_losses", lambda *_: {"loss": next(values), "shuffled_loss": 10.0}
    )
    settings = ("training.max_steps=20", "training.validate_every=1", "training.early_stopping_patience=2")
    result = train(recipe_of(tmp_path, *settings))
    assert (result.steps, result.best_value) == (4, 4.0)
    state = json.loads((tmp_path / "last/training_state.json").read_text())
    assert (state["best_step"], state["bad_validations"]) == (2, 2)


def test_time_limit(recipe_of, tmp_path, monkeypatch, caplog):
    """A clock that jumps: a minute passes with every second look at it."""
    now = [0.0]

    def clock():
        now[0] += 5.0
        return now[0]

    monkeypatch.setattr("frozenprefix.training.base_trainer.time.monotonic", clock)
    result = train(recipe_of(tmp_path, "training.max_steps=1000", "training.max_minutes=2"))
    assert 1 <= result.steps < 20
    rates = [row["learning_rate"] for row in read_log(tmp_path) if "learning_rate" in row]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.005, "the schedule follows the time, not the 1000 steps"
    assert result.best.is_dir()
    assert "so it cannot be repeated bit for bit" in caplog.text


def test_without_validation_the_last_is_the_best(recipe_of, tmp_path):
    result = train(recipe_of(tmp_path, "data.validation=[]", "training.max_steps=2"))
    assert result.best_value is None
    assert_same_tensors(tmp_path / "last/model.safetensors", result.best / "model.safetensors")


# ── precision and schedule ──


def test_fp16_needs_a_gpu(recipe_of, tmp_path):
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        train(recipe_of(tmp_path, "training.precision=fp16"))


def test_bf16_trains_with_fp32_master_weights(recipe_of, tmp_path):
    result = train(recipe_of(tmp_path, "training.precision=bf16", "training.max_steps=3"))
    assert {tensor.dtype for tensor in load_file(result.best / "model.safetensors").values()} == {torch.float32}
    model = FrozenPrefixForConditionalGeneration.from_pretrained(result.best)
    assert {p.dtype for p in model.language_model.parameters()} == {torch.bfloat16}
    assert all(math.isfinite(loss) for loss in losses_of(tmp_path))


@pytest.mark.parametrize(
    ("schedule", "step", "warmup", "progress", "factor"),
    [
        ("constant", 0, 0, 0.0, 1.0),
        ("constant", 0, 4, 0.0, 0.25),
        ("constant", 3, 4, 0.5, 1.0),
        ("linear", 10, 4, 0.75, 0.25),
        ("linear", 10, 4, 1.5, 0.0),
        ("cosine", 10, 0, 0.5, 0.5),
        ("cosine", 10, 0, 0.0, 1.0),
        ("cosine", 10, 0, 1.0, 0.0),
        ("cosine", 1, 4, 0.0, 0.5),
    ],
)
def test_schedule_by_hand(schedule, step, warmup, progress, factor):
    assert learning_rate_factor(schedule, step, warmup, progress) == pytest.approx(factor)
