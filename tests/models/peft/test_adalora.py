"""AdaLoRA: ranks that move to where they are needed, on schedule, and survive saving and resuming."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from frozenprefix.errors import ConfigError, TrainingError
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.training.setup import build_model
from frozenprefix.training.tracking import read_log
from frozenprefix.training.trainer import Trainer, train

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
MODULES = 4  # q_proj and v_proj of two layers
STEPS = 12


def adalora(**options):
    given = {"type": "adalora", "init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 3, **options}
    return "model.language_model.peft={" + ", ".join(f"{name}: {value}" for name, value in given.items()) + "}"


LENGTH = [f"training.max_steps={STEPS}", "training.save_every=4", "training.validate_every=4"]


class StoppedBetween(Trainer):
    stop = 6

    def out_of_patience(self):
        return self.progress.step >= self.stop


@pytest.fixture(scope="module")
def recipe_of(tiny_recipe, sharp_lm):
    return lambda folder, *overrides: tiny_recipe(folder, *LENGTH, *overrides, lm=sharp_lm)


@pytest.fixture(scope="module")
def whole(recipe_of, tmp_path_factory):
    """A run, its trainer, and the ranks behind every step."""
    folder = tmp_path_factory.mktemp("whole")

    class Watched(Trainer):
        def __init__(self, recipe):
            super().__init__(recipe)
            self.seen = []

        def step(self, batches):
            values = super().step(batches)
            self.seen.append(self.model.adapters["language_model"].ranks())
            return values

    trainer = Watched(recipe_of(folder, adalora()))
    return trainer.run("never"), trainer


def singular_values(model):
    return [p for n, p in model.named_parameters() if ".lora_E." in n]


def test_ranks_fall_on_schedule_to_the_budget(whole):
    _, trainer = whole
    totals = [sum(ranks) for ranks in trainer.seen]
    assert totals[:2] == [6 * MODULES] * 2, "tinit"
    assert totals[8:] == [2 * MODULES] * 4, "target_r on average, reached tfinal steps before the end"
    assert totals == sorted(totals, reverse=True)
    # the cubic schedule between the two
    for step in range(3, 9):
        left = 1 - (step - 2) / (STEPS - 3 - 2)
        assert totals[step - 1] == int((6 - 2) * MODULES * left**3 + 2 * MODULES)
    assert len(set(trainer.seen[-1])) > 1, "every matrix has kept the same rank: nothing was moved"


def test_what_is_cut_off_is_zero_and_the_rest_is_not(whole):
    _, trainer = whole
    values = singular_values(trainer.model)
    assert sum(int((p != 0).sum()) for p in values) == 2 * MODULES
    assert all(len(p) == 6 for p in values)


def test_ranks_are_logged(whole):
    result, trainer = whole
    log = {row["step"]: row for row in read_log(result.output_dir) if "loss" in row}
    for step, ranks in enumerate(trainer.seen, start=1):
        found = {name: log[step][f"language_adapter/rank_{name}"] for name in ("total", "min", "max")}
        assert found == {"total": sum(ranks), "min": min(ranks), "max": max(ranks)}


def test_the_checkpoint_holds_the_ranks_that_are_left(whole, recipe_of, tmp_path):
    result, trainer = whole
    tensors = load_file(result.output_dir / "last" / "language_adapter" / "adapter_model.safetensors")
    kept = [len(t) for name, t in tensors.items() if name.endswith("lora_E")]
    assert sorted(kept) == sorted(trainer.seen[-1])
    loaded = FrozenPrefixForConditionalGeneration.from_pretrained(result.output_dir / "last")
    trainer.model.eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    found, expected = (model.language_model(ids).logits for model in (loaded, trainer.model))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert sorted(loaded.adapters["language_model"].ranks()) == sorted(kept)
    started = Trainer(recipe_of(tmp_path / "on", adalora(), f"training.init_from={result.output_dir / 'last'}"))
    assert started.run("never").steps == STEPS
    assert sum(started.model.adapters["language_model"].ranks()) == 2 * MODULES


def test_a_checkpoint_between_two_allocations_loses_nothing(recipe_of, tmp_path):
    trainer = StoppedBetween(recipe_of(tmp_path, adalora(deltaT=4)))  # at step 6, allocated at step 4
    trainer.run("never")
    pattern = trainer.model.adapters["language_model"].config.rank_pattern
    assert 2 * MODULES < sum(map(sum, pattern.values())) < 6 * MODULES
    loaded = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path / "last")
    ids = torch.tensor([[5, 6, 7]])
    found, expected = (model.language_model(ids).logits for model in (loaded, trainer.model.eval()))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stop", [1, 6, 11])
def test_a_resumed_run_ends_at_the_same_weights(whole, recipe_of, tmp_path, stop, monkeypatch):
    monkeypatch.setattr(StoppedBetween, "stop", stop)
    StoppedBetween(recipe_of(tmp_path, adalora())).run("never")
    parts = train(recipe_of(tmp_path, adalora()))
    for name in ("model.safetensors", "adapter_state.safetensors", "language_adapter/adapter_model.safetensors"):
        one, other = (result.output_dir / "last" / name for result in (whole[0], parts))
        assert one.read_bytes() == other.read_bytes(), name


def test_the_penalty_by_hand(recipe_of, tmp_path):
    model, _ = build_model(recipe_of(tmp_path, adalora(orth_reg_weight=0.3)))
    terms = []
    with torch.no_grad():
        for name, p in model.language_model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                p.normal_()
                rows = p if ".lora_A." in name else p.T
                terms.append(float((rows @ rows.T - torch.eye(6)).pow(2).sum().sqrt()))
    assert len(terms) == 2 * MODULES
    assert float(model.adapters.penalty().detach()) == pytest.approx(0.3 * sum(terms) / len(terms), rel=1e-5)


def test_the_penalty_is_part_of_the_training_loss_alone(whole):
    _, trainer = whole
    model = trainer.model
    groups = trainer.train_groups[:2]
    batch = trainer.train_collator(groups, [[(g.samples[0], g.samples[0].targets[0])] for g in groups])
    with torch.no_grad():
        without = model.eval()(**batch).loss
        with_it = model.train()(**batch).loss
    model.eval()
    torch.testing.assert_close(with_it - without, model.adapters.penalty().detach(), rtol=1e-4, atol=1e-5)
    assert float(model.adapters.penalty().detach()) > 0


def test_schedules_that_do_not_fit_are_refused(recipe_of, tmp_path):
    with pytest.raises(ConfigError, match=r"tinit: got 9 with tfinal 3, which leaves none of 12 steps"):
        train(recipe_of(tmp_path, adalora(tinit=9)))
    with pytest.raises(ConfigError, match=r"training\.max_minutes: got 2, expected null with peft method 'adalora'"):
        recipe_of(tmp_path, adalora(), "training.max_minutes=2")
    model, _ = build_model(recipe_of(tmp_path, adalora()))
    with pytest.raises(TrainingError, match=r"call adapters\.set_total_steps"):
        model.adapters.update(1)
