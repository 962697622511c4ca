"""Training state on disk: whole or not at all, and the same after loading."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from frozenprefix.errors import CheckpointError
from frozenprefix.models.checkpoint import read_checkpoint
from frozenprefix.training import checkpoints
from frozenprefix.training.checkpoints import Progress, load_training_state, save_training_state
from frozenprefix.utils.random_state import random_state
from frozenprefix.utils.tensors import load_tensors, save_tensors

FINGERPRINT = {"seed": 1, "training.learning_rate": 0.1, "model": {"mapper": {"type": "mlp"}}}


def trained(steps=3):
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        step(module, optimizer)
    return module, optimizer


def step(module, optimizer):
    optimizer.zero_grad()
    module(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()


def test_optimizer_and_random_state_go_on_where_they_were(tmp_path):
    module, optimizer = trained()
    progress = Progress(step=3, targets_seen=12, seconds=1.5, best_value=0.25, best_step=2, fingerprint=FINGERPRINT)
    save_training_state(tmp_path, optimizer, progress, [random_state()])
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    step(module, optimizer)

    other, fresh = nn.Linear(3, 2), None
    other.load_state_dict(weights)
    fresh = torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.1)
    torch.manual_seed(99)
    assert load_training_state(tmp_path, fresh, FINGERPRINT) == progress
    step(other, fresh)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def draws() -> list[float]:
    """One number of each generator."""
    return [float(torch.rand(())), random.random(), random.gauss(), float(np.random.rand()), float(np.random.randn())]


def test_every_process_gets_its_own_random_state(tmp_path, caplog):
    _, optimizer = trained()
    states, expected = [], []
    for seed in (1, 2):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        random.gauss(), np.random.randn()  # these keep a second number for later
        states.append(random_state())
        expected.append(draws())
    save_training_state(tmp_path, optimizer, Progress(num_parts=2), states)
    for rank in (0, 1):
        load_training_state(tmp_path, optimizer, {}, rank=rank, num_parts=2)
        assert draws() == expected[rank]
    assert not caplog.messages
    load_training_state(tmp_path, optimizer, {}, rank=2, num_parts=3)
    assert "saved with 2 micro-batches a step (processes x gradient_accumulation_steps), now there are 3" in caplog.text


def test_another_recipe_is_refused_with_the_key(tmp_path):
    _, optimizer = trained()
    save_training_state(tmp_path, optimizer, Progress(fingerprint=FINGERPRINT), [random_state()])
    with pytest.raises(CheckpointError, match=r"training\.learning_rate was 0\.1, now 0\.2"):
        load_training_state(tmp_path, optimizer, FINGERPRINT | {"training.learning_rate": 0.2})
    with pytest.raises(CheckpointError, match=r"data\.train was None, now 'x'"):
        load_training_state(tmp_path, optimizer, FINGERPRINT | {"data.train": "x"})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("step", "3", r"training_state\.json: step: Input should be a valid integer"),
        ("step", -1, r"training_state\.json: step: Input should be greater than or equal to 0"),
        ("steps", 3, r"training_state\.json: steps: Unexpected"),
        ("seconds", float("nan"), r"training_state\.json: seconds: Input should be a finite number"),
    ],
)
def test_every_field_of_the_state_has_a_type(tmp_path, field, value, message):
    _, optimizer = trained()
    save_training_state(tmp_path, optimizer, Progress(), [random_state()])
    path = tmp_path / checkpoints.STATE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=message):
        load_training_state(tmp_path, optimizer, {})


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("0.exp_avg", torch.zeros(2, 4), r"0\.exp_avg has shape \(2, 4\), expected \(2, 3\)"),
        ("0.exp_avg", torch.full((2, 3), torch.nan), r"0\.exp_avg has values that are not finite"),
        ("7.exp_avg", torch.zeros(2, 3), r"7\.exp_avg: there are 2 trained tensors"),
        ("exp_avg", torch.zeros(2, 3), r"no training state that can be read"),
    ],
)
def test_optimizer_tensors_fit_their_parameters(tmp_path, name, tensor, message):
    _, optimizer = trained()
    save_training_state(tmp_path, optimizer, Progress(), [random_state()])
    path = tmp_path / checkpoints.OPTIMIZER_FILE
    save_tensors(load_tensors(path) | {name: tensor}, path)
    with pytest.raises(CheckpointError, match=message):
        load_training_state(tmp_path, optimizer, {})


def test_an_optimizer_file_that_lacks_a_tensor_is_an_error(tmp_path):
    _, optimizer = trained()
    save_training_state(tmp_path, optimizer, Progress(), [random_state()])
    path = tmp_path / checkpoints.OPTIMIZER_FILE
    save_tensors({name: tensor for name, tensor in load_tensors(path).items() if name != "0.step"}, path)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors lacks 'step' or is another optimizer's"):
        load_training_state(tmp_path, trained()[1], {})


@pytest.mark.parametrize("damage", ["missing", "cut", "other fields"])
def test_state_that_cannot_be_read_is_an_error(tmp_path, damage):
    _, optimizer = trained()
    save_training_state(tmp_path, optimizer, Progress(fingerprint=FINGERPRINT), [random_state()])
    path = tmp_path / checkpoints.STATE_FILE
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_text(path.read_text()[:20])
    else:
        path.write_text(json.dumps({"steps": 3}))
    with pytest.raises(CheckpointError, match="no training state that can be read"):
        load_training_state(tmp_path, optimizer, FINGERPRINT)


def test_a_damaged_optimizer_file_is_an_error(tmp_path):
    _, optimizer = trained()
    save_training_state(tmp_path, optimizer, Progress(fingerprint=FINGERPRINT), [random_state()])
    path = tmp_path / checkpoints.OPTIMIZER_FILE
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="no training state that can be read"):
        load_training_state(tmp_path, optimizer, FINGERPRINT)


def test_a_folder_without_weights_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors; it is no checkpoint"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half a fi")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged .*; take another checkpoint"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"nobody/nothing holds no model\.safetensors"):
        read_checkpoint("nobody/nothing", cache_dir=tmp_path, local_files_only=True)
