"""The frozen contract: evaluation mode for good, no gradient, not one bit changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from frozenprefix.models.freezing import count_parameters, evaluating, freeze, hash_tensors
from frozenprefix.training.setup import build_model
from tests.helpers.freezing import frozen_tensors

CNN = ["model.vision_encoder.name=test_byobnet", "model.vision_encoder.image_size=64"]


@pytest.fixture
def model(tiny_recipe, tiny_lm, tmp_path):
    """A CNN whose batch norms are not folded away, and GPT-2 with its dropout of 0.1."""
    return build_model(tiny_recipe(tmp_path, *CNN, lm=tiny_lm("gpt2")))[0]


def test_the_parts_of_this_test_could_change(model):
    norms = [m for m in model.vision_encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    drops = [m for m in model.language_model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    assert norms
    assert drops


def test_train_leaves_frozen_parts_in_evaluation_mode(model):
    assert model.train() is model
    assert model.training
    assert all(m.training for m in model.mapper.modules())
    frozen = [*model.vision_encoder.modules(), *model.language_model.modules()]
    assert not any(m.training for m in frozen)
    ids = torch.tensor([[model.config.image_token_id] * 2 + [5, 6]])
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        one, two = (model(input_ids=ids, pixel_values=image).logits for _ in range(2))
    assert torch.equal(one, two), "dropout of the frozen LM is awake"


def test_training_changes_no_bit_of_frozen_parts(model):
    before, own = hash_tensors(frozen_tensors(model)), hash_tensors(model.trainable_state())
    statistics = {n: b.clone() for n, b in model.vision_encoder.named_buffers() if "running" in n}
    assert statistics
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    image = model.config.image_token_id
    ids = torch.tensor([[image, image, 5, 6, 2], [image, image, 7, 8, 2]])
    model.train()
    for _ in range(2):
        loss = model(
            input_ids=ids, pixel_values=torch.randn(2, 3, 64, 64) * 5, labels=ids.where(ids != image, -100)
        ).loss
        loss.backward()
        assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("mapper."))
        assert all(p.grad is not None for p in model.mapper.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert hash_tensors(frozen_tensors(model)) == before
    assert hash_tensors(model.trainable_state()) != own
    assert all(torch.equal(statistics[n], b) for n, b in model.vision_encoder.named_buffers() if n in statistics)


def test_frozen_tensors_are_all_parameters_and_buffers_of_frozen_parts(model):
    names = set(frozen_tensors(model))
    parameters = {n for n, _ in model.named_parameters() if not n.startswith("mapper.")}
    buffers = {n for n, _ in model.named_buffers() if not n.startswith("mapper.")}
    assert any("running_mean" in name for name in buffers)
    assert names == parameters | buffers


def test_hash_sees_every_change():
    tensors = {"a": torch.zeros(2, 2), "b": torch.tensor(3), "c": torch.zeros(0), "d": torch.ones(2).bfloat16()}
    first = hash_tensors(tensors)
    assert first == hash_tensors(dict(reversed(tensors.items()))), "the order of names does not matter"
    changed = tensors["a"].clone()
    changed[1, 1] = 1e-30
    for other in (
        tensors | {"a": changed},
        tensors | {"a": torch.zeros(4)},
        tensors | {"a": torch.zeros(2, 2, dtype=torch.float64)},
        tensors | {"b": torch.tensor(4)},
        {**{n: t for n, t in tensors.items() if n != "a"}, "x": tensors["a"]},
    ):
        assert hash_tensors(other) != first


def test_freeze_and_count():
    module = nn.Sequential(nn.Linear(3, 4), freeze(nn.Sequential(nn.Linear(4, 5), nn.Dropout())))
    assert not module[1][1].training
    count = count_parameters(module)
    assert (count.trainable, count.frozen) == (16, 25)
    assert str(count) == "trainable parameters: 16 (39.02%), frozen: 25"


def test_evaluating_restores_the_mode_of_every_module():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())

    def fail():
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert [module.training for module in model] == [True, False]
    assert torch.is_grad_enabled()
