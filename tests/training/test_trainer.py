"""Training on a folder of drawings: from recipe to checkpoint, and the same run however it is cut up."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from frozenprefix.config import load_recipe
from frozenprefix.data.samples import ImageGroup
from frozenprefix.errors import CheckpointError, ConfigError, TrainingError
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.training.setup import build_model
from frozenprefix.training.tracking import read_log
from frozenprefix.training.trainer import Trainer, train
from frozenprefix.training.validation import batch_bounds, validation_losses
from tests.helpers.training import assert_same_tensors, free_port, losses_of, run_python, run_with_hashes, untimed_rows

# dropout: a resumed run must also go on with the same random numbers
DROPOUT = "model.mapper.dropout=0.2"


@pytest.fixture(scope="module")
def recipe_of(tiny_recipe, sharp_lm):
    return lambda folder, *overrides, **options: tiny_recipe(folder, *overrides, lm=sharp_lm, **options)


@pytest.fixture(scope="module")
def whole(recipe_of, tmp_path_factory):
    """Six undisturbed steps, with the frozen parts' hashes before and after."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = Trainer(recipe_of(folder, DROPOUT))
    result, hashes = run_with_hashes(trainer)
    gradients = [name for name, p in trainer.model.named_parameters() if not p.requires_grad and p.grad is not None]
    return result, hashes, gradients


# ── one run ──


def test_a_run_leaves_its_checkpoints_and_log(whole):
    result, _, _ = whole
    files = {"config.json", "model.safetensors", "recipe.yaml", "processor_config.json", "tokenizer.json"}
    assert files <= {path.name for path in result.best.iterdir()}
    last = {path.name for path in (result.output_dir / "last").iterdir()}
    assert files | {"optimizer.safetensors", "training_state.json"} <= last
    assert [path.name for path in result.output_dir.glob(".*")] == [".lock"], "something half written is left"
    assert (result.steps, result.targets_seen) == (6, 6 * 4 * 2)
    rows = read_log(result.output_dir)
    validations = [row for row in rows if "validation/loss" in row]
    assert [row["step"] for row in validations] == [0, 3, 6]
    assert all(row["validation/shuffled_loss"] != row["validation/loss"] for row in validations)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[0]["learning_rate"] == 0.01
    assert steps[0]["targets"] == 8
    assert result.best_value == min(row["validation/loss"] for row in validations[1:])


def test_the_best_checkpoint_gives_its_validation_loss_again(whole, recipe_of, tmp_path):
    result, _, _ = whole
    trainer = Trainer(recipe_of(tmp_path, DROPOUT))
    trainer.build_model()
    trainer.prepare_data()
    model = FrozenPrefixForConditionalGeneration.from_pretrained(result.best)
    losses = validation_losses(model, trainer.collator, trainer.validation_groups, 4)
    assert losses["loss"] == pytest.approx(result.best_value, abs=1e-6)
    assert load_recipe(result.best / "recipe.yaml").model == trainer.recipe.model


def test_frozen_parts_keep_every_bit(whole):
    _, (before, after), gradients = whole
    assert before == after
    assert gradients == []


def test_the_loss_falls(recipe_of, tmp_path):
    result = train(recipe_of(tmp_path, "training.max_steps=40", "training.validate_every=40"))
    losses = losses_of(result.output_dir)
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.2
    first, last = losses_of(result.output_dir, "validation/loss")
    assert last < first


# ── resuming ──


class Killed(Exception):
    pass


def killed_after(recipe, step: int, monkeypatch) -> None:
    """Run until `step` steps are done and saved, and stop without any farewell."""
    take = Trainer.step

    def step_or_die(self, batches):
        if self.progress.step == step:
            raise Killed
        return take(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step_or_die)
        with pytest.raises(Killed):
            train(recipe)


@pytest.mark.parametrize("step", [3, 5])
def test_killed_and_resumed_is_bit_for_bit_the_undisturbed_run(whole, recipe_of, tmp_path, monkeypatch, step):
    """Killed at step 5 the run goes on from step 3, where it was saved."""
    recipe = recipe_of(tmp_path, DROPOUT)
    killed_after(recipe, step, monkeypatch)
    saved = json.loads((tmp_path / "last" / "training_state.json").read_text())
    assert saved["step"] == 3
    torch.manual_seed(1234)  # a new process would not have the old one's random state either
    result = train(recipe)
    undisturbed = whole[0]
    for file in (
        "last/model.safetensors",
        "last/optimizer.safetensors",
        "last/random_state.safetensors",
        "best/model.safetensors",
    ):
        assert_same_tensors(undisturbed.output_dir / file, tmp_path / file)
    assert result.targets_seen == undisturbed.targets_seen
    assert result.best_value == undisturbed.best_value

    assert untimed_rows(tmp_path) == untimed_rows(undisturbed.output_dir)


SIGKILL_SCRIPT = """
import os, signal, sys
from frozenprefix.training.trainer import Trainer, train
from frozenprefix.config import load_recipe
save = Trainer.save_last
def save_and_die(self):
    save(self)
    os.kill(os.getpid(), signal.SIGKILL)
Trainer.save_last = save_and_die
train(load_recipe(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_process_that_was_killed_can_be_resumed(whole, recipe_of, tmp_path):
    recipe = recipe_of(tmp_path / "run", DROPOUT)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    done = run_python("-c", SIGKILL_SCRIPT, str(tmp_path / "recipe.yaml"))
    assert done.returncode == -signal.SIGKILL, done.stderr
    train(recipe)
    # one thread there, and perhaps several here: sums may differ in their last bits
    assert_same_tensors(
        whole[0].output_dir / "last/model.safetensors", tmp_path / "run/last/model.safetensors", atol=1e-5
    )


def test_the_loss_scale_of_fp16_is_restored(recipe_of, tmp_path):
    """On a CPU nothing is scaled; the scaler is put where accelerate has it."""
    scales = []
    for scale in (1024.0, 65536.0):
        trainer = Trainer(recipe_of(tmp_path))
        trainer.setup()
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.restore("auto")
        scales.append(trainer.accelerator.scaler.get_scale())
        trainer.save_last()
    assert scales == [1024.0, 1024.0]


@pytest.mark.slow
def test_two_processes_resumed_are_the_undisturbed_two(recipe_of, shapes, tmp_path):
    """Each has its own random state: what is sampled differs in length, and with it the numbers that are drawn."""
    overrides = (
        f"data.train=[{{type: captions, path: {shapes}, split: train}}]",
        "objectives={lm: 1.0, self_critical: {samples: 2, max_new_tokens: 8}}",
        "model.language_model.peft={type: lora, r: 2, lora_dropout: 0.3}",
        "training.schedule=constant",
    )
    for name, steps in (("whole", 6), ("parts", 3), ("parts", 6)):
        recipe = recipe_of(tmp_path / name, DROPOUT, *overrides, f"training.max_steps={steps}")
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
        launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port())
        done = run_python(*launcher, "recipes/train.py", str(tmp_path / "recipe.yaml"))
        assert done.returncode == 0, done.stderr
    for file in ("model.safetensors", "language_adapter/adapter_model.safetensors"):
        assert_same_tensors(tmp_path / "whole/last" / file, tmp_path / "parts/last" / file)


def test_a_finished_run_is_left_as_it_is(recipe_of, tmp_path):
    recipe = recipe_of(tmp_path, "training.max_steps=2", "training.validate_every=5")
    first = train(recipe)
    before = (read_log(tmp_path), load_file(tmp_path / "last" / "model.safetensors"))
    again = train(recipe)
    assert (again.steps, again.best_value) == (first.steps, first.best_value)
    assert read_log(tmp_path) == before[0], "validated again"
    assert all(torch.equal(t, before[1][n]) for n, t in load_file(tmp_path / "last" / "model.safetensors").items())


def test_never_starts_anew_and_a_path_goes_on_from_there(whole, recipe_of, tmp_path):
    start = whole[0].output_dir / "last"
    result = train(recipe_of(tmp_path, DROPOUT), resume=str(start))
    assert result.steps == 6
    assert not losses_of(tmp_path), "all steps were done before"
    anew = train(recipe_of(tmp_path, "training.max_steps=1"), resume="never")
    assert anew.steps == 1
    with pytest.raises(CheckpointError, match="no folder '/nowhere'"):
        train(recipe_of(tmp_path), resume="/nowhere")


def test_another_recipe_is_not_resumed(whole, recipe_of):
    folder = whole[0].output_dir
    state = (folder / "last" / "training_state.json").read_text()
    with pytest.raises(CheckpointError, match=r"another recipe: training\.learning_rate was 0\.01, now 0\.02"):
        train(recipe_of(folder, DROPOUT, "training.learning_rate=0.02"))
    assert (folder / "last" / "training_state.json").read_text() == state


def test_a_constant_rate_run_can_be_made_longer(recipe_of, tmp_path):
    constant = "training.schedule=constant"
    train(recipe_of(tmp_path / "a", constant, "training.max_steps=2"))
    longer = train(recipe_of(tmp_path / "a", constant, "training.max_steps=4"))
    at_once = train(recipe_of(tmp_path / "b", constant, "training.max_steps=4"))
    assert longer.steps == 4
    assert_same_tensors(at_once.output_dir / "last/model.safetensors", tmp_path / "a/last/model.safetensors")


# ── the same step in other ways ──


@pytest.fixture(scope="module")
def plain(recipe_of, tmp_path_factory):
    """Six steps without dropout."""
    return train(recipe_of(tmp_path_factory.mktemp("plain"))).output_dir


def test_accumulation_gives_the_same_weights(plain_descent, recipe_of, tmp_path):
    for parts in (1, 2):
        settings = ("training.learning_rate=1", f"training.gradient_accumulation_steps={parts}")
        train(recipe_of(tmp_path / str(parts), *settings))
    one, two = (tmp_path / name / "last/model.safetensors" for name in "12")
    assert_same_tensors(one, two, atol=1e-5)


@pytest.mark.parametrize("packing", ["flat", "none"])
def test_packing_gives_the_same_losses(plain, recipe_of, tmp_path, packing):
    train(recipe_of(tmp_path, f"training.packing={packing}"))
    assert losses_of(tmp_path) == pytest.approx(losses_of(plain), rel=1e-5)
    assert losses_of(tmp_path, "validation/loss") == pytest.approx(losses_of(plain, "validation/loss"), rel=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_without_the_feature_cache(plain, recipe_of, tmp_path, workers):
    """Cached features are stored in float16: the losses are near, not equal."""
    train(recipe_of(tmp_path, "data.feature_cache=off", f"data.workers={workers}"))
    assert losses_of(tmp_path) == pytest.approx(losses_of(plain), rel=2e-3)
    assert losses_of(tmp_path) != losses_of(plain)


def test_a_step_is_divided_evenly(recipe_of, tmp_path):
    with pytest.raises(
        ConfigError, match=r"images_per_step: got 4, expected a multiple of gradient_accumulation_steps 3"
    ):
        train(recipe_of(tmp_path, "training.gradient_accumulation_steps=3"))


# ── validation, reproducibility ──


@pytest.mark.parametrize(
    ("count", "size", "bounds"),
    [
        (2, 4, [(0, 2)]),
        (8, 4, [(0, 4), (4, 8)]),
        (9, 4, [(0, 4), (4, 9)]),
        (10, 4, [(0, 4), (4, 8), (8, 10)]),
        (3, 2, [(0, 3)]),
    ],
)
def test_every_validation_image_counts_once_and_none_is_alone(count, size, bounds):
    assert batch_bounds(count, size) == bounds


def test_shuffled_groups_of_images_keep_none_of_their_own():
    """Groups of two images: (0, 1), (2, 3), (4, 5)."""
    shown = []
    model = SimpleNamespace(
        training=False,
        device="cpu",
        eval=lambda: None,
        modules=lambda: (),
        prefix=lambda image_features: image_features,
        packed_loss=lambda packed, prefix: shown.append(prefix.flatten().tolist()) or torch.tensor(2.0),
    )

    class Packed:
        num_tokens = 5

        def to(self, device):
            return self

    groups = [ImageGroup((Path(f"{i}a"), Path(f"{i}b")), ()) for i in range(3)]
    features = torch.arange(6.0).view(6, 1, 1)

    class Collate:
        def __call__(self, part, chosen):
            return {"packed": Packed(), **self.image_inputs([path for group in part for path in group.images])}

        def image_inputs(self, paths):
            known = [path for group in groups for path in group.images]
            return {"image_features": features[[known.index(path) for path in paths]]}

    losses = validation_losses(model, Collate(), groups, 2)
    assert shown == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5], [0, 1]]
    assert losses == {"loss": 2.0, "shuffled_loss": 2.0}


def test_validation_does_not_depend_on_the_batch_size(whole, recipe_of, tmp_path):
    trainer = Trainer(recipe_of(tmp_path, DROPOUT))
    trainer.build_model()
    trainer.prepare_data()
    groups = trainer.train_groups[:5]
    model = trainer.model.train()
    all_at_once, in_pairs = (validation_losses(model, trainer.collator, groups, size)["loss"] for size in (5, 2))
    assert in_pairs == pytest.approx(all_at_once, rel=1e-5)
    assert model.training
    with pytest.raises(TrainingError, match="at least 2 images, got 1"):
        validation_losses(model, trainer.collator, groups[:1], 2)


def test_the_seed_decides_the_start(recipe_of, tmp_path):
    states = [build_model(recipe_of(tmp_path, f"seed={seed}"))[0].trainable_state() for seed in (0, 0, 1)]
    name = "mapper.body.layers.0.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


def test_prompts_of_the_recipe_go_into_the_checkpoint(recipe_of, tmp_path):
    result = train(recipe_of(tmp_path, "data.prompts={caption: 'it is'}", "training.max_steps=1"))
    assert FrozenPrefixProcessor.from_pretrained(result.best).prompt_for("caption") == "<image>it is"
