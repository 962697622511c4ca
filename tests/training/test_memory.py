"""When memory runs out, the message names keys and values."""

from __future__ import annotations

import pytest
import torch

from frozenprefix.errors import TrainingError
from frozenprefix.training import Trainer
from frozenprefix.training.memory import explaining_memory, smaller_steps
from tests.helpers.contrastive import contrastive_recipe


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
    ids=["python", "gpu", "cpu"],
)
def test_a_run_out_of_memory_says_what_to_lower(tiny_recipe, tmp_path, monkeypatch, error):
    def fail(self, batches):
        raise error

    monkeypatch.setattr(Trainer, "step", fail)
    with pytest.raises(TrainingError) as caught:
        Trainer(tiny_recipe(tmp_path / "run")).run("never")
    message = str(caught.value)
    assert message.startswith("step 1: memory ran out; raise training.gradient_accumulation_steps from 1 to 2, for 2")
    assert "lower training.targets_per_image from 2 to 1" in message
    assert caught.value.__cause__ is error


def test_other_errors_stay_as_they_are(tiny_recipe, tmp_path):
    with pytest.raises(RuntimeError, match="something else"), explaining_memory(tiny_recipe(tmp_path).training, step=1):
        raise RuntimeError("something else")


def test_what_is_advised_is_a_valid_recipe(tiny_recipe, tmp_path):
    settings = tiny_recipe(tmp_path, "training.images_per_step=6", "training.gradient_accumulation_steps=2").training
    assert smaller_steps(settings) == [
        "raise training.gradient_accumulation_steps from 2 to 6, for 1 in place of 3 images at a time, with the same "
        "result",
        "lower training.targets_per_image from 2 to 1",
        "lower training.images_per_step from 6 to 3",
    ]
    tiny_recipe(tmp_path, "training.images_per_step=6", "training.gradient_accumulation_steps=6")
    single = tiny_recipe(tmp_path, "training.images_per_step=1", "training.targets_per_image=null").training
    assert smaller_steps(single) == ["set training.targets_per_image to a number, such as 5"]


def test_contrastive_runs_have_their_own_keys(tiny_bert, shapes, tmp_path):
    settings = contrastive_recipe(tiny_bert, shapes, tmp_path).training
    assert smaller_steps(settings)[0].startswith("set training.gradient_cache=true")
    cached = contrastive_recipe(tiny_bert, shapes, tmp_path, "training.gradient_cache=true").training
    assert smaller_steps(cached)[0] == "lower training.texts_per_chunk from 3 to 1"
