"""Label smoothing and word dropout: in the loss that is trained, not in the one that is validated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from frozenprefix.errors import CheckpointError, ConfigError
from frozenprefix.training.trainer import Trainer, train
from tests.helpers.training import started


@pytest.fixture(scope="module")
def recipe_of(tiny_recipe, sharp_lm):
    return lambda folder, *overrides: tiny_recipe(folder, *overrides, lm=sharp_lm)


def first_loss(trainer: Trainer) -> float:
    """The loss that the first step trains on."""
    torch.manual_seed(0)
    batch = trainer.objectives.prepare(next(trainer.batches()), 0)
    return trainer.objectives(batch, {"lm": 1.0})["lm"].item()


def validated(trainer: Trainer) -> float:
    return trainer.measure()["loss"]


def test_a_smoothed_label_is_a_mean_of_all_words(recipe_of, tmp_path):
    trainer = started(recipe_of(tmp_path, "training.label_smoothing=0.25"))
    batch = trainer.objectives.prepare(next(trainer.batches()), 0)
    packed, prefix = batch["packed"], trainer.model.prefix(None, batch["image_features"])
    logits = trainer.model.lm.logits(trainer.model.packed_hidden(packed, prefix), torch.float32)[packed.edge_source]
    each = torch.nn.functional.cross_entropy(logits, packed.edge_label, reduction="none", label_smoothing=0.25)
    expected = (each * packed.edge_weight).sum() / packed.num_tokens
    smoothed = trainer.model.packed_loss(packed, prefix, label_smoothing=0.25)
    assert smoothed.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_dropped_word_is_not_read(recipe_of, tmp_path):
    trainer = started(recipe_of(tmp_path))
    model, batch = trainer.model.eval(), trainer.objectives.prepare(next(trainer.batches()), 0)
    packed, prefix = batch["packed"], model.prefix(None, batch["image_features"])
    words = packed.draw_words(1.0)
    others = replace(packed, input_ids=packed.input_ids.masked_fill(words, 7))
    loss_of = lambda rows, **options: model.packed_loss(rows, prefix, **options).item()  # noqa: E731
    assert loss_of(packed) != pytest.approx(loss_of(others), rel=1e-3)
    assert loss_of(packed, word_dropout=1.0) == loss_of(others, word_dropout=1.0)


def test_placeholders_are_not_dropped_and_the_share_is_kept(recipe_of, tmp_path):
    trainer = started(recipe_of(tmp_path))
    packed = trainer.objectives.prepare(next(trainer.batches()), 0)["packed"]
    torch.manual_seed(0)
    assert not packed.draw_words(1.0)[packed.prefix_index >= 0].any()
    share = torch.stack([packed.draw_words(0.3) for _ in range(200)]).sum() / (200 * packed.draw_words(1.0).sum())
    assert float(share) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("option", ["training.label_smoothing=0.3", "training.word_dropout=0.5"])
def test_the_training_loss_alone_is_regularised(recipe_of, tmp_path, option):
    plain, changed = (started(recipe_of(tmp_path / name, *o)) for name, o in [("a", []), ("b", [option])])
    assert first_loss(plain) != pytest.approx(first_loss(changed), rel=1e-3)
    assert validated(plain) == validated(changed)


@pytest.mark.parametrize("option", ["label_smoothing", "word_dropout"])
def test_a_run_is_resumed_with_the_same(recipe_of, tmp_path, option):
    train(recipe_of(tmp_path, "training.max_steps=2", f"training.{option}=0.1"))
    with pytest.raises(CheckpointError, match=rf"training\.{option}"):
        train(recipe_of(tmp_path, "training.max_steps=2"))


def test_word_dropout_needs_a_causal_language_model(tiny_recipe, tiny_lm, tmp_path):
    options = ("training.packing=none", "training.word_dropout=0.1")
    with pytest.raises(ConfigError, match=r"training\.word_dropout: got 0\.1, expected 0 with"):
        Trainer(tiny_recipe(tmp_path, *options, lm=tiny_lm("t5"))).setup()
