"""Adapters on disk: saved, loaded, read by plain peft, spoilt; and a peft model that the user already has."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from frozenprefix.errors import CheckpointError, ConfigError
from frozenprefix.models.configuration import FrozenPrefixConfig
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.state_dict import copy_into
from tests.helpers.peft import LM, METHODS, PROMPTS, batch_of, gradients_of, inputs_of, logits_of, shake

# peft asks transformers under an old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


# ── on disk ──


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_is_the_same_model(built, pixels, tmp_path, method):
    model, processor = built("llama", METHODS[method])
    expected = logits_of(model, processor, pixels)
    model.save_pretrained(tmp_path)
    assert {p.name for p in (tmp_path / "language_adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = FrozenPrefixForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, processor, pixels), expected)
    assert loaded.adapters["language_model"].named_parameters()


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3"])
def test_plain_peft_reads_the_adapter(built, lm_of, pixels, tmp_path, method):
    from peft import PeftModel

    model, processor = built("llama", METHODS[method])
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(lm_of("llama"))
    theirs = PeftModel.from_pretrained(base, tmp_path / "language_adapter").eval()
    with torch.no_grad():
        embeds = model.fuse(inputs_of(processor, PROMPTS[:1], None)["input_ids"], model.prefix(pixels[:1]))[0]
        expected = theirs(inputs_embeds=embeds).logits
    torch.testing.assert_close(model.language_model(inputs_embeds=embeds).logits, expected, rtol=1e-5, atol=1e-5)


def test_spoilt_adapters_are_refused_by_name(built, tmp_path):
    from safetensors.torch import load_file, save_file

    model, _ = built("llama", LM + "{type: lora, r: 2}")
    model.save_pretrained(tmp_path / "good")

    def load(folder):
        return FrozenPrefixForConditionalGeneration.from_pretrained(folder)

    wrong = shutil.copytree(tmp_path / "good", tmp_path / "wrong")
    path = wrong / "language_adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name, other = sorted(tensors)[:2]
    tensors["nobody"] = tensors.pop(name)
    tensors[other] = torch.zeros(3)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        load(wrong)
    for part in (f"missing {name}", "unexpected nobody", f"{other} has shape (3,), expected"):
        assert part in str(caught.value)
    shutil.rmtree(wrong / "language_adapter")
    with pytest.raises(CheckpointError, match="language_adapter cannot be read"):
        load(wrong)

    config = json.loads((tmp_path / "good" / "config.json").read_text())
    config["language_model"]["peft"] = None
    (tmp_path / "good" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"holds language_adapter/, but its config\.json names no peft method"):
        load(tmp_path / "good")


# ── a peft model that the user already has ──


@pytest.mark.parametrize("trained", [False, True])
def test_a_users_own_peft_model(built, lm_of, shapes, pixels, tmp_path, trained):
    from peft import LoraConfig, get_peft_model

    plain, processor = built("llama")

    def theirs():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(lm_of("llama"))
        model = get_peft_model(base, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM"))
        return model if trained else model.requires_grad_(False)

    config = FrozenPrefixConfig.from_dict(plain.config.to_dict())
    encoder = plain.vision_encoder
    own = theirs()
    with torch.no_grad():
        embeds = plain.fuse(inputs_of(processor, PROMPTS[:1], None)["input_ids"], plain.prefix(pixels[:1]))[0]
        expected = own(inputs_embeds=embeds).logits
    model = FrozenPrefixForConditionalGeneration(config, encoder, own).eval()
    copy_into(model.trainable_state(), plain.trainable_state(), "plain")
    assert torch.equal(model.language_model(inputs_embeds=embeds).logits, expected)
    _, gradients = gradients_of(model, batch_of(processor, shapes, "trie"))
    assert bool(gradients) == trained
    assert all(p.grad is None for n, p in model.language_model.named_parameters() if "lora_" not in n)
    shake(model)
    changed = logits_of(model, processor, pixels)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "language_adapter").exists() == trained
    loaded = FrozenPrefixForConditionalGeneration.from_pretrained(
        tmp_path, vision_encoder=encoder, language_model=theirs()
    )
    assert torch.equal(logits_of(loaded, processor, pixels), changed)
    with pytest.raises(ConfigError, match="expected a transformers model or a peft model"):
        FrozenPrefixForConditionalGeneration(config, encoder, torch.nn.Linear(2, 2))
