"""Prepacked copies of frozen weights: the same products, the same gradients, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from frozenprefix.kernels import linear, prepack
from frozenprefix.kernels.linear import PrepackedWeight, prepackable_dtypes
from frozenprefix.kernels.prepack import prepackable_layers, prepacked_bytes, prepacked_frozen_weights
from frozenprefix.models.packing.loss import next_token_loss
from tests.helpers.lm import tiny_lm_config
from tests.models.packing.test_loss import small_tiles

pytestmark = pytest.mark.skipif(not prepackable_dtypes(), reason="PyTorch has no oneDNN here")
BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        torch.bfloat16 not in prepackable_dtypes(), reason="the processor has no products in bfloat16"
    ),
)


NARROWEST = prepackable_dtypes()[-1] if prepackable_dtypes() else torch.float32  # bfloat16 where the processor has it


def frozen_lm(family: str, dtype: torch.dtype = torch.bfloat16):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_lm_config(family), dtype=dtype).requires_grad_(False).eval()


def logits_and_gradient(lm) -> tuple[torch.Tensor, torch.Tensor]:
    embeds = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1)).to(lm.dtype).requires_grad_()
    logits = lm(inputs_embeds=embeds, use_cache=False).logits
    logits.float().square().sum().backward()
    return logits.detach().float(), embeds.grad.float()


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2", "gemma"])
def test_logits_and_gradients_stay_what_they_are(family):
    lm = frozen_lm(family)
    expected = logits_and_gradient(lm)
    with prepacked_frozen_weights(lm):
        found = logits_and_gradient(lm)
    exact = logits_and_gradient(copy.deepcopy(lm).float())
    for before, after, truth in zip(expected, found, exact, strict=True):
        # both round to bfloat16 at every layer; neither is further from float32 than the other
        rounding = (before - truth).norm()
        assert 0 < rounding < 0.1 * truth.norm()
        assert (after - truth).norm() < 1.5 * rounding
    assert torch.equal(logits_and_gradient(lm)[0], expected[0]), "outside the block nothing is prepacked"


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2", "gemma"])
def test_in_float32_they_are_equal(family):
    lm = frozen_lm(family, torch.float32)
    expected = logits_and_gradient(lm)
    with prepacked_frozen_weights(lm):
        assert "forward" in vars(lm.get_output_embeddings())
        found = logits_and_gradient(lm)
    for before, after in zip(expected, found, strict=True):
        assert (after - before).norm() < 1e-5 * before.norm()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_loss_reads_the_prepacked_head(dtype, bias, monkeypatch):
    monkeypatch.setattr("frozenprefix.models.packing.loss.ROWS", 4)
    small_tiles(monkeypatch)
    head = nn.Linear(16, 50, bias=bias).to(dtype).requires_grad_(False)
    hidden = torch.randn(10, 16).to(dtype).requires_grad_()
    source, label = torch.arange(10).repeat(2), torch.randint(0, 50, (20,))

    def loss_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        loss = next_token_loss(hidden, head, source, label, torch.rand(20, generator=torch.Generator().manual_seed(0)))
        return loss.detach(), torch.autograd.grad(loss, hidden)[0].float()

    expected = loss_and_gradient()
    with prepacked_frozen_weights(nn.ModuleList([head])):
        asked: list[torch.Tensor] = []
        forward = PrepackedWeight.forward
        monkeypatch.setattr(PrepackedWeight, "forward", lambda tile, x: (asked.append(x), forward(tile, x))[1])
        found = loss_and_gradient()
    assert len(asked) == 12, "three blocks of rows, four tiles of words"
    for before, after in zip(expected, found, strict=True):
        assert (after - before).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * before.norm()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("layer", [nn.Linear(24, 40), nn.Linear(24, 40, bias=False), Conv1D(40, 24)])
def test_a_product_equals_the_layers_own(layer, dtype):
    layer = layer.to(dtype).requires_grad_(False)
    holder = nn.ModuleList([layer])
    x = torch.randn(3, 5, 24, dtype=dtype).transpose(0, 1).requires_grad_()
    weight = layer.weight.float() if isinstance(layer, Conv1D) else layer.weight.float().t()
    expected = x.float() @ weight + (0 if layer.bias is None else layer.bias.float())
    wanted = weight.sum(dim=1).expand(x.shape)
    with prepacked_frozen_weights(holder):
        found = layer(x)
        (gradient,) = torch.autograd.grad(found.sum(), x)
    # bfloat16 has 8 bits, so a rounded result is off by 0.4 % at most
    rtol = 0.004 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.float(), expected, rtol=rtol, atol=1e-5)
    torch.testing.assert_close(gradient.float(), wanted, rtol=rtol, atol=1e-5)


def test_only_frozen_layers_are_prepacked():
    lm = frozen_lm("llama", NARROWEST)
    every = prepackable_layers(lm)
    assert len(every) == 15
    assert prepacked_bytes(every) == 2 * sum(layer.weight.nbytes for layer in every)
    trained = lm.model.layers[0].mlp.up_proj
    trained.weight.requires_grad_()
    assert len(prepackable_layers(lm)) == 14
    with prepacked_frozen_weights(lm):
        assert "forward" not in vars(trained)
        assert "forward" in vars(lm.model.layers[1].mlp.up_proj)
    assert "forward" not in vars(lm.model.layers[1].mlp.up_proj)
    assert prepackable_layers(frozen_lm("llama", torch.float16)) == []


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_over_prepacked_layers_train_as_over_others(family, method):
    """AdaLoRA adds to what its base layer returns, in place."""
    peft = pytest.importorskip("peft")
    configs = {
        "lora": peft.LoraConfig(r=2),
        "dora": peft.LoraConfig(r=2, use_dora=True),
        "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1),
        "ia3": peft.IA3Config(),
    }
    torch.manual_seed(0)
    lm = peft.get_peft_model(frozen_lm(family), configs[method])
    trained = [p for p in lm.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:  # adapters that start at nothing would hide much
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.tensor([[5, 6, 7, 8, 9]])

    def gradient() -> torch.Tensor:
        lm.zero_grad()
        lm(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.float().flatten() for p in trained if p.grad is not None])

    expected = gradient()
    with prepacked_frozen_weights(lm.get_base_model()):
        found = gradient()
    assert expected.norm() > 0
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_what_a_prepacked_product_returns_may_be_changed_in_place():
    layer = nn.Linear(8, 8).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    with prepacked_frozen_weights(nn.ModuleList([layer])):
        made = layer(x)
        made += 1
        made.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_under_autocast_a_layer_does_what_it_does_outside(dtype):
    layer = nn.Linear(8, 8).to(dtype).requires_grad_(False)
    x = torch.randn(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(x)
        with prepacked_frozen_weights(nn.ModuleList([layer])):
            assert torch.equal(layer(x), expected)


def test_an_error_leaves_the_layers_as_they_were():
    lm = frozen_lm("gpt2")
    with pytest.raises(RuntimeError, match="stop"), prepacked_frozen_weights(lm):
        raise RuntimeError("stop")
    assert not any("forward" in vars(module) for module in lm.modules())


def test_large_models_are_left_alone(monkeypatch, caplog):
    lm = frozen_lm("llama")
    every = prepackable_layers(lm)
    monkeypatch.setattr(prepack, "MAX_BYTES", prepacked_bytes(every) - 1)
    assert prepackable_layers(lm) == [layer for layer in every if layer is not lm.lm_head], "the head goes first"
    monkeypatch.setattr(prepack, "MAX_BYTES", prepacked_bytes(prepackable_layers(lm)) - 1)
    with caplog.at_level("INFO", logger="frozenprefix"):
        assert prepackable_layers(lm) == []
    assert "frozen weights are not prepacked: the copies would take" in caplog.text


def test_weights_and_their_names_are_untouched():
    lm = frozen_lm("llama")
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    with prepacked_frozen_weights(lm):
        logits_and_gradient(lm)
        inside = lm.state_dict()
        assert inside.keys() == before.keys()
    assert all(torch.equal(inside[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in lm.parameters())


def test_training_packs_while_it_steps(monkeypatch):
    """In between, and not in the measures of the frozen model's text before and after it."""
    from frozenprefix.training.base_trainer import BaseTrainer
    from frozenprefix.training.trainer import Trainer

    trainer = Trainer.__new__(Trainer)
    trainer.model = nn.Module()
    trainer.model.language_model = frozen_lm("llama", NARROWEST)
    layer = trainer.model.language_model.model.layers[0].mlp.up_proj
    packed = []
    monkeypatch.setattr(BaseTrainer, "take_steps", lambda self: packed.append("forward" in vars(layer)))
    trainer.take_steps()
    assert packed == [True]
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_rows_are_padded_so_that_onednn_keeps_few_kernels(dtype, monkeypatch):
    """The results are equal to the last bit for the rows that count."""
    torch.manual_seed(0)
    weight = PrepackedWeight(nn.Linear(48, 80).to(dtype).requires_grad_(False))
    inputs = [torch.randn(rows, 48, dtype=dtype) for rows in (1, 7, 31, 32, 33, 60)]
    asked, operator = [], linear._operator
    monkeypatch.setattr(
        linear, "_operator", lambda name: lambda x, *rest: (asked.append(len(x)), operator(name)(x, *rest))[1]
    )
    padded = [weight.forward(x) for x in inputs]
    assert sorted(set(asked) - {80}) == [1, 7, 31, 32, 64], "few rows are not padded"
    assert [len(output) for output in padded] == [len(x) for x in inputs]
    monkeypatch.setattr(linear, "ROW_MULTIPLE", 1)
    for x, output in zip(inputs, padded, strict=True):
        assert torch.equal(weight.forward(x), output)
