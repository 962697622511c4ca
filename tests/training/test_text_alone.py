"""Conversations in text alone: they train a language model that has trained parts, and a frozen one not at all."""

from __future__ import annotations

import json

import pytest

from frozenprefix.data.samples import with_images
from frozenprefix.errors import DataError
from frozenprefix.evaluation.samples import folder_samples
from frozenprefix.training import load_samples, train
from frozenprefix.training.setup import load_parts
from frozenprefix.training.trainer import Trainer
from tests.helpers.training import PLAIN_DESCENT, assert_same_tensors, free_port, losses_of, run_python

LORA = "model.language_model.peft={type: lora, r: 2, target_modules: all-linear}"


@pytest.fixture
def mixed_recipe(tiny_recipe, shapes, tmp_path):
    """A recipe on drawings, and on four conversations in text alone."""
    talks = [
        {"id": str(n), "conversations": [{"from": "human", "value": f"is {n} red?"}, {"from": "gpt", "value": "no"}]}
        for n in range(4)
    ]
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    source = {"type": "llava", "path": str(tmp_path), "file": "talks.json"}

    def make(*overrides: str):
        drawings = {"type": "captions", "path": str(shapes), "split": "train", "name": "captions"}
        sources = f"data.train={json.dumps([drawings, source])}"
        return tiny_recipe(tmp_path / "run", sources, *overrides)

    return make


def test_an_adapted_language_model_learns_from_them(mixed_recipe):
    recipe = mixed_recipe(LORA, "training.images_per_step=1", "training.targets_per_image=1", "training.max_steps=12")
    trainer = Trainer(recipe)
    trainer.setup()
    images = [len(group.images) for group in trainer.train_groups]
    assert sorted(images) == [0] * 4 + [1] * 8
    batches, steps = trainer.batches(), []
    for _ in range(12):
        steps.append(trainer.step(batches))
    assert all(step["loss"] > 0 and step["gradient_norm"] > 0 for step in steps), "alone in a step, too"
    assert train(recipe).steps == 12


@pytest.mark.slow
def test_two_processes_are_one(plain_descent, mixed_recipe, shapes, tmp_path):
    """Where one process has images and the other has none, in steps of two samples."""
    steps = ("training.images_per_step=2", "training.targets_per_image=1", "training.max_steps=6")
    train(mixed_recipe(LORA, *steps, f"output_dir={tmp_path / 'one'}"))
    recipe = mixed_recipe(LORA, *steps, f"output_dir={tmp_path / 'two'}")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    (tmp_path / "train.py").write_text(PLAIN_DESCENT)
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port())
    done = run_python(*launcher, str(tmp_path / "train.py"), str(tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr
    trainer = Trainer(recipe)
    trainer.setup()
    order = [image for step in range(6) for _, image in trainer.stream.step(step)]
    shown = [len(trainer.train_groups[image].images) for image in order]
    assert {tuple(sorted(pair)) for pair in zip(shown[::2], shown[1::2], strict=True)} >= {(0, 1)}
    for file in ("model.safetensors", "language_adapter/adapter_model.safetensors"):
        assert_same_tensors(tmp_path / "one/last" / file, tmp_path / "two/last" / file, atol=1e-5)
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)


def test_a_frozen_language_model_learns_nothing_from_them(mixed_recipe, caplog):
    trainer = Trainer(mixed_recipe())
    trainer.setup()
    assert len(trainer.train_groups) == 8
    assert "data.train: 4 of 12 samples are left out: no image 4" in caplog.text


def test_they_are_never_validated_or_evaluated(mixed_recipe, tmp_path):
    recipe = mixed_recipe()
    sources = {"train": recipe.data.train, "validation": recipe.data.train}
    parts = load_parts(recipe.data.model_copy(update=sources), without_images=True)
    assert (len(parts["train"]), len(parts["validation"])) == (12, 8)
    talks = load_samples(recipe.data.train[1:], "train")
    with pytest.raises(DataError, match=r"all of its 4 samples are left out \(no image 4\)"):
        with_images(talks, where="data.train")
    assert folder_samples(recipe.data.train[0]["path"], "caption")
