"""Two processes, with data parallelism and with sharded frozen layers, against one."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from frozenprefix.data.cache import FeatureCache
from frozenprefix.errors import ConfigError
from frozenprefix.training.setup import load_samples
from frozenprefix.training.sharding import requested_sharding
from frozenprefix.training.trainer import Trainer, train
from tests.helpers import ROOT
from tests.helpers.drawings import write_shapes
from tests.helpers.training import assert_same_tensors, free_port, losses_of, run_python

STEPS = ("training.max_steps=20", "training.log_every=1", "training.precision=fp32", "model.mapper.dropout=0.2")
LORA = "model.language_model.peft={type: lora, r: 2, lora_dropout: 0.1}"
TWO_PARTS = "training.gradient_accumulation_steps=2"

HANG = """
import os, signal, sys, time
from frozenprefix.config import load_recipe
from frozenprefix.data.collation import Collator
from frozenprefix.training import Trainer

how, recipe = sys.argv[1:]
calls = []
collate = Collator.__call__

def hang(self, *arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and trainer.progress.step == (3 if how == "validating" else 4):
        os.kill(os.getpid(), signal.SIGSTOP) if how == "stopped" else time.sleep(600)
    return collate(self, *arguments)

Collator.__call__ = hang
trainer = Trainer(load_recipe(recipe))
trainer.run()
"""


@pytest.fixture(scope="module")
def recipe_of(tiny_recipe, sharp_lm):
    return lambda folder, *overrides, **options: tiny_recipe(folder, *STEPS, *overrides, lm=sharp_lm, **options)


def launch(config: str, recipe, folder, *arguments: str, **environment: str):
    """`accelerate launch --config_file recipes/accelerate/CONFIG.yaml recipes/train.py RECIPE`."""
    path = folder.with_suffix(".yaml")
    path.write_text(recipe.to_yaml())
    file = ROOT / f"recipes/accelerate/{config}.yaml"
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(file), "--main_process_port", free_port())
    return run_python(*launcher, "recipes/train.py", str(path), *arguments, **environment)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
@pytest.mark.parametrize("overrides", [(), (LORA,)], ids=["mapper", "lora"])
def test_two_processes_give_the_losses_of_one(recipe_of, tmp_path, config, overrides):
    """Dropout included: it depends on the micro-batch, of which both runs have the same."""
    one = train(recipe_of(tmp_path / "one", TWO_PARTS, *overrides)).output_dir
    done = launch(config, recipe_of(tmp_path / "two", *overrides), tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("FSDP2" in done.stderr) == (config == "fsdp2"), done.stderr[-3000:]
    losses = losses_of(tmp_path / "two")
    assert len(losses) == 20
    assert losses == pytest.approx(losses_of(one), abs=1e-5)
    assert losses_of(tmp_path / "two", "validation/loss") == pytest.approx(losses_of(one, "validation/loss"), abs=1e-5)
    for name in sorted(path.relative_to(one) for path in (one / "last").rglob("*model.safetensors")):
        assert_same_tensors(one / name, tmp_path / "two" / name, atol=1e-4)


@pytest.mark.slow
def test_two_processes_encode_every_view_of_images_that_can_be_read(recipe_of, tmp_path):
    """Each process sees other bad images; what is left is divided as if both had seen all of them."""
    data = write_shapes(tmp_path / "shapes")
    first = sorted((data / "images").glob("red_*"))[0]
    first.write_bytes(b"no image")
    views = ["data.augmentation={crops: 0}", f"data.feature_cache={tmp_path / 'cache'}", "data.max_bad_share=0.5"]
    done = launch("ddp", recipe_of(tmp_path / "two", *views, data=data), tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    whole, mirrored = (FeatureCache.open(tmp_path / name) for name in ("cache", "cache/mirrored"))
    train_images = [
        image for group in load_samples(recipe_of(tmp_path, data=data).data.train, "train") for image in group.images
    ]
    good = {whole.key_of(path) for path in train_images if path.name != first.name}
    assert set(mirrored) == good


@pytest.mark.slow
def test_a_state_does_not_depend_on_how_it_was_trained(recipe_of, tmp_path):
    """Half a run with sharded layers in two processes, the other half in one."""
    constant = "training.schedule=constant"  # with another schedule a step depends on the length of the run
    whole = train(recipe_of(tmp_path / "whole", TWO_PARTS, constant)).output_dir
    folder = tmp_path / "parts"
    done = launch("fsdp2", recipe_of(folder, constant), folder, "training.max_steps=10")
    assert done.returncode == 0, done.stderr[-3000:]
    train(recipe_of(folder, TWO_PARTS, constant), resume=str(folder / "last"))
    assert losses_of(folder) == pytest.approx(losses_of(whole), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "loading", "validating"])
def test_a_process_that_hangs_ends_the_run_and_is_named(recipe_of, tmp_path, how):
    """Process 1 is stopped by a signal, or its data never come, in a step or a validation."""
    (tmp_path / "run.yaml").write_text(
        recipe_of(tmp_path / "run", "training.process_timeout=4", "training.save_every=2").to_yaml()
    )
    (tmp_path / "hang.py").write_text(HANG)
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port())
    before = time.monotonic()
    done = run_python(*launcher, str(tmp_path / "hang.py"), how, str(tmp_path / "run.yaml"))
    assert time.monotonic() - before < 120  # torchrun waits 30 s for the stopped process
    assert done.returncode != 0
    named = "Ranks 1 failed to pass" if how == "stopped" else "process 1 of 2 has been loading a batch or validating"
    assert named in done.stderr, done.stderr[-3000:]
    assert (tmp_path / "run" / "last" / "training_state.json").is_file()


@pytest.mark.slow
def test_two_nodes(recipe_of, tmp_path):
    """The command lines of docs/scaling.md, with both nodes on this machine."""
    one = train(recipe_of(tmp_path / "one", TWO_PARTS)).output_dir
    recipe, port = tmp_path / "two.yaml", free_port()
    recipe.write_text(recipe_of(tmp_path / "two").to_yaml())
    nodes = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1")
    nodes += ("--master_addr", "127.0.0.1", "--master_port", port)
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(run_python, *nodes, "--node_rank", rank, "recipes/train.py", str(recipe)) for rank in "01"]
    for done in both:
        assert done.result().returncode == 0, done.result().stderr[-3000:]
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(one), abs=1e-5)


def test_accelerates_launcher_with_cpu_starts_one_process(recipe_of, tmp_path):
    (tmp_path / "run.yaml").write_text(recipe_of(tmp_path / "run").to_yaml())
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "recipes/train.py")
    done = run_python(*launcher, str(tmp_path / "run.yaml"), FROZENPREFIX_DEBUG="")
    assert done.returncode != 0
    assert "with --cpu it starts one process only; use --config_file" in " ".join(done.stderr.split())


def test_dropout_depends_on_the_micro_batch(recipe_of, tmp_path):
    """Not on what was drawn before it."""

    losses = []
    for number, draws in enumerate((0, 3)):
        trainer = Trainer(recipe_of(tmp_path / str(number)))
        trainer.setup()
        torch.rand(draws)
        losses.append(trainer.step(trainer.batches())["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "got DeepSpeed .*, expected DDP or FSDP2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "got Megatron-LM"),
        ({"ACCELERATE_USE_FSDP": "true"}, "got fsdp_version 1, expected 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "got fsdp_offload_params true",
        ),
    ],
)
def test_other_ways_to_shard_are_refused(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        requested_sharding()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objectives.self_critical={weight: 1.0}"], "self_critical: got FSDP2"),
        (["training.precision=fp16"], "fp16"),
    ],
)
def test_what_cannot_be_sharded_is_refused(monkeypatch, recipe_of, tmp_path, overrides, message):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ConfigError, match=message):
        Trainer(recipe_of(tmp_path, *overrides))
