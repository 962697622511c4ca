"""peft in training: frozen weights stay, merging and unmerging, adapters of the encoder, resumed runs."""

from __future__ import annotations

import pytest
import torch

from frozenprefix.errors import ConfigError
from frozenprefix.models.encoder_configuration import TimmEncoderConfig
from frozenprefix.models.freezing import count_parameters, hash_tensors
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.section import PeftMethodConfig
from frozenprefix.training.setup import build_model
from frozenprefix.training.trainer import Trainer, train
from tests.helpers.peft import LM, LORA, METHODS, PREFIX, batch_of, gradients_of, logits_of

# peft asks transformers under an old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


# ── freezing and merging ──


@pytest.mark.parametrize("method", METHODS)
def test_training_changes_the_adapter_and_no_bit_around_it(built, shapes, method):
    dropout = METHODS[method].replace("type: lora", "type: lora, lora_dropout: 0.5")
    model, processor = built("gpt2", dropout, fresh=True)
    own = model.adapters.parameter_ids()
    base = {n: p for n, p in model.language_model.named_parameters() if id(p) not in own}
    base |= dict(model.language_model.named_buffers())
    assert not any(p.requires_grad for p in base.values())
    before = hash_tensors(base)
    first = {n: p.detach().clone() for n, p in model.adapters["language_model"].named_parameters().items()}
    expected = sum(p.numel() for p in first.values()) + sum(p.numel() for p in model.mapper.parameters())
    assert count_parameters(model).trainable == expected
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    model.train()
    model.adapters.set_total_steps(4)
    batch = batch_of(processor, shapes, "trie")
    for step in range(1, 3):
        model(**batch).loss.backward()
        assert all(p.grad is None for p in base.values())
        optimizer.step()
        model.adapters.update(step)
        optimizer.zero_grad()
    assert hash_tensors(base) == before
    assert all(not torch.equal(p, first[n]) for n, p in model.adapters["language_model"].named_parameters().items())


def test_only_the_adapters_own_dropout_wakes(built, shapes):
    model, processor = built("gpt2", LM + "{type: lora, lora_dropout: 0.5}")
    batch = batch_of(processor, shapes, "trie")
    model.train()
    awake = {n for n, m in model.language_model.named_modules() if m.training}
    assert awake
    assert all(".lora_dropout" in name for name in awake)
    with torch.no_grad():
        assert not torch.equal(model(**batch).loss, model(**batch).loss)
        model.eval()
        assert not any(m.training for m in model.modules())
        assert torch.equal(model(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3"])
def test_merged_adapters_give_the_same_logits_and_unmerging_every_bit(built, pixels, method, family):
    model, processor = built(family, METHODS[method])
    adapted = logits_of(model, processor, pixels)
    own = model.adapters.parameter_ids()
    base = {n: p for n, p in model.language_model.named_parameters() if id(p) not in own}
    before = hash_tensors(base)
    model.adapters.merge()
    assert hash_tensors(base) != before
    # one rounding of the sum of two weights stands for the rounding of two products: 1.5e-5 of the largest logit was
    # measured on an Intel processor, 1e-5 at most on AMD
    tolerance = 4e-5 * float(adapted.abs().max())
    torch.testing.assert_close(logits_of(model, processor, pixels), adapted, rtol=1e-5, atol=tolerance)
    with pytest.raises(ConfigError, match=r"call adapters\.unmerge\(\) first"):
        model.train()
    model.adapters.unmerge()
    assert hash_tensors(base) == before
    assert torch.equal(logits_of(model, processor, pixels), adapted)


def test_virtual_tokens_cannot_be_merged(built):
    with pytest.raises(ConfigError, match="virtual tokens have no weights"):
        built("llama", PREFIX)[0].adapters.merge()


def test_adapters_of_a_bfloat16_model_are_float32(built, shapes, monkeypatch):
    for name, override in METHODS.items():
        model, processor = built("llama", override, "training.precision=bf16")
        assert model.language_model.dtype == torch.bfloat16
        adapter = model.adapters["language_model"]
        assert {p.dtype for p in adapter.named_parameters().values()} == {torch.float32}
        loss, gradients = gradients_of(model, batch_of(processor, shapes, "trie"))
        assert torch.isfinite(loss)
        assert all(g.dtype == torch.float32 and g.abs().sum() > 0 for g in gradients.values()), name
    model, _ = built("llama", LORA, "training.precision=bf16")
    layer = model.language_model.model.layers[0].self_attn.q_proj
    seen = []
    layer.lora_B["default"].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    layer(torch.ones(1, 1, 32, dtype=torch.bfloat16))
    assert seen == [torch.bfloat16]


# ── the encoder ──


VISION = ["model.vision_encoder.peft={type: lora, r: 2, target_modules: [qkv]}", "data.feature_cache=off"]


def test_an_adapted_encoder_is_trained_through_the_frozen_lm(built, lm_of, tiny_recipe, shapes, pixels, tmp_path):
    model, processor = built("llama", *VISION)
    _, gradients = gradients_of(model, batch_of(processor, shapes, "trie"))
    assert gradients.keys() == {n for n in gradients if n.startswith("vision_encoder.") and ".qkv.lora_" in n}
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    assert not any(p.grad is not None for n, p in model.vision_encoder.named_parameters() if "lora_" not in n)

    recipe = tiny_recipe(tmp_path / "run", *VISION, "training.max_steps=3", LORA, lm=lm_of("llama"))
    result = train(recipe)
    assert (result.best / "vision_adapter" / "adapter_model.safetensors").is_file()
    loaded = FrozenPrefixForConditionalGeneration.from_pretrained(result.best)
    fresh, _ = build_model(recipe)
    changed = loaded.vision_encoder(pixels) - fresh.vision_encoder(pixels)
    assert changed.abs().max() > 0
    expected = loaded.vision_encoder(pixels)
    loaded.adapters.merge()
    torch.testing.assert_close(loaded.vision_encoder(pixels), expected, rtol=1e-4, atol=1e-5)


def test_features_of_an_adapted_encoder_cannot_be_cached(tiny_recipe, tmp_path):
    with pytest.raises(
        ConfigError, match=r"feature_cache: got 'auto', expected 'off' with model\.vision_encoder\.peft"
    ):
        tiny_recipe(tmp_path, VISION[0])
    with pytest.raises(ConfigError, match=r"model\.vision_encoder\.peft: trains layers of its own"):
        tiny_recipe(tmp_path, *VISION, "model.vision_encoder.trainable=all")
    assert "peft" not in TimmEncoderConfig(name="x", peft={"type": "lora"}).feature_fields()


def test_attention_that_peft_would_change_in_place_is_refused():
    from frozenprefix.models.peft.build import make_adapter

    block = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    with pytest.raises(ConfigError, match=r"torch\.nn\.MultiheadAttention, whose frozen weights peft changes"):
        make_adapter(block, PeftMethodConfig(type="lora", target_modules=["0"]), "vision_encoder")


# ── resuming ──


class StoppedHalfWay(Trainer):
    def out_of_patience(self):
        return self.progress.step >= 3


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "prompt_tuning"])
def test_a_resumed_run_ends_at_the_same_weights(tiny_recipe, sharp_lm, tmp_path, method):
    override = METHODS[method].replace("type: lora", "type: lora, lora_dropout: 0.3")
    whole = train(tiny_recipe(tmp_path / "whole", override, lm=sharp_lm))
    recipe = tiny_recipe(tmp_path / "parts", override, lm=sharp_lm)
    StoppedHalfWay(recipe).run("never")
    parts = train(recipe)
    assert parts.steps == whole.steps == 6
    for name in ("model.safetensors", "language_adapter/adapter_model.safetensors"):
        one, other = (result.output_dir / "last" / name for result in (whole, parts))
        assert one.read_bytes() == other.read_bytes()
