"""Whole frozen layers as one function: the layer's own result and gradient, and the layer itself where it has to be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from frozenprefix.kernels import attention_for_rows, llama_layer, prepackable_dtypes, prepacked_frozen_weights
from frozenprefix.models.packing import Target, ancestor_mask, pack
from frozenprefix.models.packing.loss import next_token_loss
from tests.helpers.lm import tiny_lm_config
from tests.kernels.test_prepack import BF16

pytestmark = pytest.mark.skipif(not prepackable_dtypes(), reason="PyTorch has no oneDNN here")
IMAGE = 299
WHOLE = ("llama", "mistral", "qwen2")


def random_lm(family: str, dtype: torch.dtype = torch.float32, **changes):
    """With norms and biases that are not what a new model's are."""
    torch.manual_seed(0)
    config = tiny_lm_config(family)
    config.update(changes)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False).eval()
    for name, parameter in lm.named_parameters():
        if parameter.ndim == 1:
            parameter += 0.3 * torch.randn_like(parameter)
        elif "proj" in name:
            parameter *= 5
    return lm.to(dtype)


def read_rows(lm) -> tuple[Tensor, Tensor]:
    """Last hidden states of two rows of tries, and the gradient of their embeddings, in float32."""
    texts = [[[5, 6, 7, 8], [5, 6, 9]], [[10, 11, 12, 13, 14]], [[5, 20, 21], [22, 23], [5, 20, 24, 25]]]
    groups = [[Target([IMAGE, IMAGE, *ids, 2], 2) for ids in image] for image in texts]
    packed = pack(groups, image_token_id=IMAGE, prefix_length=2, tokens_per_row=14)
    embeds = torch.randn(*packed.input_ids.shape, 32, generator=torch.Generator().manual_seed(1))
    embeds = embeds.to(lm.dtype).requires_grad_()
    mask = ancestor_mask(packed.subtree_end, lm.dtype)
    with attention_for_rows(lm):
        out = lm.base_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=packed.position_ids, use_cache=False
        ).last_hidden_state
    out.float().square().sum().backward()
    return out.detach().float(), embeds.grad.float()


def assert_alike(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for ours, own in zip(found, expected, strict=True):
        assert (ours - own).norm() < 2e-6 * own.norm()


@pytest.fixture
def whole_layers(monkeypatch) -> list[int]:
    """Grows by one for every layer that is computed as one function with a gradient."""
    calls: list[int] = []
    compute = llama_layer.FrozenLayer.compute

    def counting(layer, hidden_states, *args):
        if hidden_states.requires_grad:  # and not the check at set-up
            calls.append(1)
        return compute(layer, hidden_states, *args)

    monkeypatch.setattr(llama_layer.FrozenLayer, "compute", counting)
    return calls


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in WHOLE),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 16}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"num_key_value_heads": 4}),
    ],
)
def test_in_float32_result_and_gradient_are_the_layers_own(family, changes, whole_layers):
    lm = random_lm(family, **changes)
    expected = read_rows(lm)
    with prepacked_frozen_weights(lm):
        found = read_rows(lm)
    assert len(whole_layers) == 2
    assert_alike(found, expected)


@pytest.mark.skipif(torch.bfloat16 not in prepackable_dtypes(), reason="the processor has no products in bfloat16")
@pytest.mark.parametrize("family", WHOLE)
def test_in_bfloat16_it_is_no_further_from_float32(family, whole_layers):
    lm = random_lm(family, torch.bfloat16)
    expected = read_rows(lm)
    with prepacked_frozen_weights(lm):
        found = read_rows(lm)
    assert len(whole_layers) == 2
    exact = read_rows(lm.float())
    for own, ours, truth in zip(expected, found, exact, strict=True):
        rounding = (own - truth).norm()
        assert 0 < rounding < 0.1 * truth.norm()
        assert (ours - truth).norm() < 1.2 * rounding


@pytest.mark.parametrize("family", ["gemma", "qwen3", "phi3", "gpt2", "opt"])
def test_other_families_keep_their_layers(family, whole_layers):
    lm = random_lm(family)
    expected = read_rows(lm)
    with prepacked_frozen_weights(lm):
        found = read_rows(lm)
    assert not whole_layers
    assert (found[1] - expected[1]).norm() < 1e-5 * expected[1].norm()


def test_a_layer_with_something_trained_in_it_keeps_its_way(whole_layers):
    lm = random_lm("llama")
    lm.model.layers[0].post_attention_layernorm.weight.requires_grad_()
    lm.model.layers[1].mlp.up_proj.weight.requires_grad_()
    with prepacked_frozen_weights(lm):
        read_rows(lm)
    assert not whole_layers
    assert lm.model.layers[0].post_attention_layernorm.weight.grad is not None
    assert lm.model.layers[1].mlp.up_proj.weight.grad is not None


@pytest.mark.parametrize("changes", [{"attention_dropout": 0.1}, {"hidden_act": "gelu"}])
def test_what_a_layer_does_besides_is_left_to_it(changes, whole_layers):
    lm = random_lm("llama", **changes)
    with prepacked_frozen_weights(lm):
        read_rows(lm)
    assert not whole_layers


def test_hooks_on_a_part_are_called(whole_layers):
    """MAGMA's adapters are such hooks, and so is what records attention."""
    lm, seen = random_lm("llama"), []
    with prepacked_frozen_weights(lm):
        handle = lm.model.layers[0].mlp.register_forward_hook(lambda *call: seen.append(call))
        read_rows(lm)
        assert (len(seen), len(whole_layers)) == (1, 1), "the other layer has none"
        handle.remove()
        read_rows(lm)
    assert (len(seen), len(whole_layers)) == (1, 3)


def test_hooks_on_the_layer_go_on(whole_layers):
    """Flamingo's cross-attention changes what goes into a layer."""
    lm = random_lm("llama")
    lm.model.layers[1].register_forward_pre_hook(lambda layer, args: (args[0] * 2, *args[1:]))
    expected = read_rows(lm)
    with prepacked_frozen_weights(lm):
        found = read_rows(lm)
    assert len(whole_layers) == 2
    assert_alike(found, expected)


def test_with_a_cache_the_layer_itself_is_used(whole_layers):
    lm = random_lm("llama")
    ids = torch.tensor([[1, 5, 6, 7]])
    expected = lm.generate(ids, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with prepacked_frozen_weights(lm):
        found = lm.generate(ids, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert not whole_layers
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


def test_hidden_states_can_be_asked_for(whole_layers):
    lm = random_lm("llama")
    ids, mask = torch.tensor([[1, 5, 6, 7]]), torch.full((1, 1, 4, 4), torch.finfo().min).triu(1)
    expected = lm(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    with prepacked_frozen_weights(lm), attention_for_rows(lm):
        found = lm(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    assert not whole_layers, "transformers' hooks, which record attention too, are on the layers' parts"
    assert len(found) == len(expected) == 3
    for own, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)


def test_hooks_on_the_way_back_are_called(whole_layers):
    lm, seen = random_lm("llama"), []
    with prepacked_frozen_weights(lm):
        lm.model.layers[0].mlp.register_full_backward_hook(lambda *call: seen.append(call) or None)
        read_rows(lm)
    assert (len(seen), len(whole_layers)) == (1, 1)


def test_what_a_layer_returns_may_be_changed_in_place(whole_layers):
    lm = random_lm("llama")
    lm.model.layers[0].register_forward_hook(lambda layer, args, output: output.add_(1))
    expected = read_rows(lm)
    with prepacked_frozen_weights(lm):
        found = read_rows(lm)
    assert len(whole_layers) == 2
    assert (found[1] - expected[1]).norm() < 2e-6 * expected[1].norm()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own call
@pytest.mark.parametrize("method", ["LNTuningConfig", "AdaptionPromptConfig", "LoraConfig"])
def test_adapters_keep_the_layers_way(method, whole_layers):
    peft = pytest.importorskip("peft")
    options = {"AdaptionPromptConfig": {"adapter_len": 2, "adapter_layers": 1}}.get(method, {})
    lm = peft.get_peft_model(random_lm("llama"), getattr(peft, method)(task_type="CAUSAL_LM", **options))
    ids = torch.tensor([[1, 5, 6, 7]])
    expected = lm(input_ids=ids).logits
    with prepacked_frozen_weights(lm.get_base_model()):
        changed = [layer for layer in lm.modules() if isinstance(vars(layer).get("forward"), llama_layer.FrozenLayer)]
        assert not any(parameter.requires_grad for layer in changed for parameter in layer.parameters())
        assert len(changed) == (1 if method == "AdaptionPromptConfig" else 0)
        found = lm(input_ids=ids).logits
        found.sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in lm.parameters())
    assert not any("forward" in vars(layer) for layer in lm.modules() if isinstance(layer, torch.nn.Linear))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_under_autocast_a_layer_does_what_it_does_outside(dtype, whole_layers):
    lm = random_lm("llama", dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = read_rows(lm)
        with prepacked_frozen_weights(lm):
            found = read_rows(lm)
    assert not whole_layers
    assert torch.equal(found[0], expected[0])


def test_no_weight_is_copied_twice():
    lm = random_lm("llama")
    with prepacked_frozen_weights(lm):
        read_rows(lm)
        edges = torch.arange(3), torch.arange(3), torch.ones(3)
        next_token_loss(torch.randn(3, 32, requires_grad=True), lm.lm_head, *edges)
        lm.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=2)
        layer = lm.model.layers[0]
        assert {"_weight", "_transposed"} <= vars(layer.forward.gate_up).keys() & vars(
            layer.mlp.down_proj.forward
        ).keys()
        assert not {"_weight", "_transposed"} & vars(layer.mlp.up_proj.forward).keys()
        assert {"_weight", "_transposed"} <= vars(lm.lm_head.forward.tiles[0]).keys()
        assert not {"_weight", "_transposed"} & vars(lm.lm_head.forward).keys()


def test_outside_of_the_block_nothing_is_left():
    lm = random_lm("llama")
    with prepacked_frozen_weights(lm):
        assert isinstance(lm.model.layers[0].forward, llama_layer.FrozenLayer)
    assert not any("forward" in vars(module) for module in lm.modules())
