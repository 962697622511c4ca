"""Optimizers and their groups, the moving average of the weights, and the measure of the best checkpoint."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from frozenprefix.errors import ConfigError
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.training.averaging import WeightAverage
from frozenprefix.training.optimizer import build_optimizer
from frozenprefix.training.trainer import Trainer, train
from frozenprefix.training.validation import validation_losses
from tests.helpers.training import assert_same_tensors, losses_of

SETTINGS = {"learning_rate": 0.1, "weight_decay": 0.0, "betas": (0.9, 0.99)}


@pytest.fixture(scope="module")
def recipe_of(tiny_recipe, sharp_lm):
    return lambda folder, *overrides: tiny_recipe(folder, *overrides, lm=sharp_lm)


def two_parts() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"mapper": nn.Linear(12, 10), "fusion": nn.Linear(12, 10)})


def step_of(name: str, **settings) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights after one step on a fixed gradient, and that gradient."""
    model = two_parts()
    optimizer = build_optimizer(name, model.named_parameters(), **{**SETTINGS, **settings})
    sum(layer(torch.linspace(-1, 1, 12)).square().sum() for layer in model.values()).backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
    optimizer.step()
    return dict(model.named_parameters()), gradients


# ── groups ──


def test_matrices_are_decayed_and_nothing_else():
    decayed, _ = step_of("adamw", weight_decay=0.5)
    plain, _ = step_of("adamw")
    start = two_parts()
    for name, weight in start.named_parameters():
        shrunk = 0.1 * 0.5 * weight if weight.ndim == 2 else 0
        torch.testing.assert_close(decayed[name], plain[name] - shrunk)


def test_a_part_has_its_own_learning_rate():
    slow, _ = step_of("adamw", part_rates={"fusion": 0.001})
    start = two_parts()
    moved = {name: (slow[name] - p).abs().max().item() for name, p in start.named_parameters()}
    assert moved["mapper.weight"] == pytest.approx(0.1, rel=1e-3)
    assert moved["fusion.weight"] == pytest.approx(0.001, rel=1e-3)


def test_a_rate_for_a_part_that_is_not_trained_is_refused(recipe_of, tmp_path):
    trainer = Trainer(recipe_of(tmp_path, "training.learning_rates={language_model: 1e-4}"))
    with pytest.raises(ConfigError, match=r"learning_rates: nothing is trained in language_model; .*one of: mapper"):
        trainer.setup()


@pytest.mark.parametrize("text", ["{mapper: 0}", "{head: 1e-3}"])
def test_wrong_rates_are_refused_with_the_recipe(recipe_of, tmp_path, text):
    with pytest.raises(ConfigError, match=r"training\.learning_rates"):
        recipe_of(tmp_path, f"training.learning_rates={text}")


def test_rates_of_parts_follow_the_schedule(recipe_of, tmp_path):
    rates = "{fusion: 1e-4, mapper: 1e-3}"
    trainer = Trainer(recipe_of(tmp_path, "model.fusion.type=deep_prefix", f"training.learning_rates={rates}"))
    trainer.setup()
    trainer.progress.step = 3  # half of a cosine over 6 steps
    trainer.set_learning_rate()
    assert {round(group["lr"], 7) for group in trainer.optimizer.param_groups} == {5e-5, 5e-4}


# ── optimizers ──


def test_muon_steps_have_equal_singular_values():
    """Unlike those of the gradient, of which the largest is a hundred times the smallest here."""
    model = two_parts()
    weight = model["mapper"].weight
    optimizer = build_optimizer("muon", model.named_parameters(), **SETTINGS)
    scales = torch.logspace(0, -2, 10)
    gradient = torch.eye(10, 12) * scales[:, None]
    before = weight.detach().clone()
    (weight * gradient).sum().backward()
    optimizer.step()
    singular = torch.linalg.svdvals(before - weight.detach())
    assert singular.max() / singular.min() < 2
    assert singular.max().item() == pytest.approx(0.1 * 0.2 * 12**0.5, rel=0.35)  # as large as a step of AdamW


def test_lion_steps_are_signs():
    after, gradients = step_of("lion")
    start = dict(two_parts().named_parameters())
    for name, gradient in gradients.items():
        torch.testing.assert_close(start[name] - after[name], 0.1 * gradient.sign())


@pytest.mark.parametrize("name", ["muon", "lion", "adafactor"])
def test_every_optimizer_trains_and_resumes_bit_for_bit(recipe_of, tmp_path, name):
    options = (f"training.optimizer={name}", "training.schedule=constant", "training.learning_rate=3e-3")
    whole = train(recipe_of(tmp_path / "whole", *options, "training.max_steps=6"))
    train(recipe_of(tmp_path / "parts", *options, "training.max_steps=3"))
    parts = train(recipe_of(tmp_path / "parts", *options, "training.max_steps=6"))
    for file in ("model", "optimizer"):
        assert_same_tensors(*(run.output_dir / "last" / f"{file}.safetensors" for run in (whole, parts)))
    losses = losses_of(whole.output_dir, "validation/loss")
    assert losses[-1] < losses[0]


# ── the moving average ──


def test_average_follows_the_rule():
    weights = {"a": torch.zeros(3)}
    average = WeightAverage(weights, decay=0.25)
    expected = torch.zeros(3)
    for update in range(1, 6):
        weights["a"].fill_(update)
        average.update()
        decay = min(0.25, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * update
    torch.testing.assert_close(average.state["a"], expected)
    with average.applied():
        torch.testing.assert_close(weights["a"], expected)
    assert weights["a"].tolist() == [5, 5, 5]


def test_weights_come_back_after_an_error():
    weights = {"a": torch.zeros(1)}
    average = WeightAverage(weights, decay=0.5)
    weights["a"] += 1
    with pytest.raises(RuntimeError), average.applied():
        raise RuntimeError
    assert weights["a"].item() == 1


def test_the_best_checkpoint_is_the_average_and_the_last_is_not(recipe_of, tmp_path):
    recipe = recipe_of(tmp_path, "training.ema=0.9")
    result = train(recipe)
    best, last = (load_file(tmp_path / name / "model.safetensors") for name in ("best", "last"))
    average = load_file(tmp_path / "last" / "average.safetensors")
    name = "mapper.body.layers.0.weight"
    assert not torch.equal(last[name], average[name])
    assert torch.equal(best[name], average[name])  # the last validation was the best
    trainer = Trainer(recipe)
    trainer.build_model()
    trainer.prepare_data()
    model = FrozenPrefixForConditionalGeneration.from_pretrained(result.best)
    losses = validation_losses(model, trainer.collator, trainer.validation_groups, 4)
    assert losses["loss"] == pytest.approx(result.best_value, abs=1e-6)


def test_the_average_is_resumed_bit_for_bit(recipe_of, tmp_path):
    options = ("training.ema=0.9", "training.schedule=constant")
    train(recipe_of(tmp_path / "whole", *options))
    train(recipe_of(tmp_path / "parts", *options, "training.max_steps=3"))
    train(recipe_of(tmp_path / "parts", *options))
    for file in ("last/average", "last/model", "best/model"):
        assert_same_tensors(*(tmp_path / run / f"{file}.safetensors" for run in ("whole", "parts")))


# ── the best checkpoint ──


def test_the_best_checkpoint_can_be_that_of_the_highest_cider(recipe_of, tmp_path):
    result = train(recipe_of(tmp_path, "training.best_by=cider_d", "training.max_steps=12"))
    scores = losses_of(tmp_path, "validation/cider_d")
    assert len(scores) == 5
    assert result.best_by == "minus cider_d"
    assert result.best_value == -max(scores[1:])


def test_cider_needs_validation_data(recipe_of, tmp_path):
    with pytest.raises(ConfigError, match=r"training\.best_by: got 'cider_d', which needs captions in data.validation"):
        recipe_of(tmp_path, "training.best_by=cider_d", "data.validation=[]")
