"""peft in the language model and in the encoder: packed rows, generation, saving, merging, freezing."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from frozenprefix.data.collation import Collator
from frozenprefix.data.samples import PictureGroup, Sample
from frozenprefix.errors import CheckpointError, ConfigError
from frozenprefix.models.configuration import FrozenPrefixConfig, PeftMethodConfig, VisionEncoderConfig
from frozenprefix.models.freezing import count_parameters, hash_tensors
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.peft import validate_peft
from frozenprefix.training.loop import Trainer, train
from frozenprefix.training.recipe import Recipe
from frozenprefix.training.setup import build_model

from .conftest import save_tiny_lm, tiny_recipe_dict

LM = "model.language_model.peft="
LORA = LM + "{type: lora, r: 2, target_modules: all-linear}"
PREFIX = LM + "{type: prefix_tuning, num_virtual_tokens: 3}"
PROMPT = LM + "{type: prompt_tuning, num_virtual_tokens: 3}"
METHODS = {
    "lora": LORA,
    "dora": LM + "{type: dora, r: 2}",
    "adalora": LM + "{type: adalora, init_r: 3, target_r: 1}",
    "ia3": LM + "{type: ia3}",
    "prefix_tuning": PREFIX,
    "prompt_tuning": PROMPT,
}
FAMILIES = ["gpt2", "opt", "llama", "qwen3", "gemma", "gemma3"]
PROMPTS = ["<image>", "a red <image> question", "<image> what color is this", "the <image> dog <image> man"]
TEXTS = ["a red circle", "a red dog in grass", "the dog runs", "a cat"]
# peft asks transformers under an old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def lm_of(tmp_path_factory):
    """Folder of a tiny LM whose words depend on all before them."""
    folders = {}

    def make(family: str):
        if family not in folders:
            folders[family] = save_tiny_lm(tmp_path_factory.mktemp(f"sharp_{family}"), family, sharpness=6.0)
        return folders[family]

    return make


@pytest.fixture(scope="module")
def built(lm_of, tiny_recipe, tmp_path_factory):
    """A model whose adapter is trained as it were: its weights are random, and far from doing nothing."""
    made = {}

    def make(family: str, *overrides: str, fresh: bool = False):
        key = (family, *overrides)
        if fresh or key not in made:
            recipe = tiny_recipe(tmp_path_factory.mktemp("run"), *overrides, lm=lm_of(family))
            model, processor = build_model(recipe)
            made[key] = shake(model).eval(), processor
        return made[key]

    return make


def shake(model):
    torch.manual_seed(5)
    with torch.no_grad():
        for adapter in model.adapters.values():
            for parameter in adapter.named_parameters().values():
                parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2


def inputs_of(processor, prompts, pixel_values):
    texts = [processor.with_image(prompt) for prompt in prompts]
    return {**processor(text=texts, return_tensors="pt"), "pixel_values": pixel_values}


def logits_of(model, processor, pixels):
    with torch.no_grad():
        return model(**inputs_of(processor, PROMPTS, pixels)).logits


def batch_of(processor, shapes, packing: str):
    groups = []
    for number, name in enumerate(("red_circle", "green_square")):
        path = shapes / "images" / f"{name}.png"
        groups.append(PictureGroup((path,), (Sample(f"s{number}", (path,), tuple(TEXTS)),)))
    return Collator(processor, packing=packing)(groups, [[(g.samples[0], text) for text in TEXTS] for g in groups])


def gradients_of(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {f"{part}.{n}": p.grad for part, a in model.adapters.items() for n, p in a.named_parameters().items()}
    return loss.detach(), {name: grad.clone() for name, grad in found.items()}


# ── options ──


def test_a_recipe_reports_all_wrong_options_at_once(tiny_lm, shapes, tmp_path):
    data = tiny_recipe_dict(tiny_lm("llama"), shapes, tmp_path)
    data["model"]["language_model"]["peft"] = {"type": "lora", "rank": 2, "lora_dropuot": 0.1, "lora_alpha": "big"}
    data["model"]["vision_encoder"]["peft"] = {"type": "prompt_tuning"}
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict(data)
    text = str(caught.value)
    for part in (
        "model.language_model.peft.rank: peft method 'lora' has no such option",
        "model.language_model.peft.lora_dropuot: peft method 'lora' has no such option (did you mean 'lora_dropout'?)",
        "model.language_model.peft.lora_alpha: Input should be a valid number, got 'big'",
        "model.vision_encoder.peft.type: got 'prompt_tuning', which puts tokens before a text; expected one of: "
        "adalora, dora, ia3, lora",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "lroa"}, r"unknown peft method 'lroa' \(did you mean 'lora'\?\)"),
        ({"type": "lora", "r": 0}, "peft.r: Input should be greater than or equal to 1, got 0"),
        ({"type": "lora", "bias": "all"}, "peft.bias: peft method 'lora' has no such option"),
        ({"type": "adalora", "init_r": 4, "target_r": 4}, "target_r: got 4, expected fewer than init_r 4"),
        ({"type": "lora", "target_modules": "a", "layers_to_transform": [1]}, "cannot be used when `target_modules`"),
    ],
)
def test_options_of_a_method(options, message):
    (line,) = validate_peft(PeftMethodConfig(**options), "language_model")
    with pytest.raises(ValueError, match=message):
        raise ValueError(line)


def test_options_are_those_of_peft():
    import inspect

    import peft

    from frozenprefix.models.peft import PEFT_METHODS

    classes = {"lora": "Lora", "dora": "Lora", "adalora": "AdaLora", "ia3": "IA3"}
    for name in PEFT_METHODS.names():
        config = getattr(peft, classes.get(name, name.title().replace("_", "")) + "Config")
        ours, theirs = (inspect.signature(one).parameters for one in (PEFT_METHODS.get(name), config))
        assert ours.keys() <= theirs.keys()
        if name in ("lora", "adalora"):
            differ = {key for key in ours if ours[key].default != theirs[key].default}
            assert differ <= {"rank_pattern", "alpha_pattern"}  # None for an empty dict


def test_layers_that_peft_does_not_find_are_named(built):
    with pytest.raises(ConfigError, match=r"peft\.target_modules: missing, and peft has no default.*gate_up_proj, lm_"):
        built("phi3", LM + "{type: lora}")
    with pytest.raises(ConfigError, match=r"Target modules .*nothere.*linear layers of LlamaForCausalLM: down_proj, "):
        built("llama", LM + "{type: lora, target_modules: [nothere]}")


def test_a_tied_output_layer_is_refused_and_an_untied_one_trained(built, shapes):
    tied = LM + "{type: lora, target_modules: [lm_head]}"
    with pytest.raises(ConfigError, match="'lm_head' shares its weight between word embeddings and output layer"):
        built("llama", tied)
    model, processor = built("qwen2", tied.replace("lm_head", "lm_head, embed_tokens"))
    _, gradients = gradients_of(model, batch_of(processor, shapes, "trie"))
    assert len(gradients) == 4
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


# ── packed rows, plain rows, generation ──


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "prompt_tuning"])
def test_packed_rows_give_the_loss_and_gradient_of_plain_ones(built, shapes, method, family):
    model, processor = built(family, METHODS[method])
    expected, wanted = gradients_of(model, batch_of(processor, shapes, "none"))
    for packing in ("flat", "trie"):
        loss, found = gradients_of(model, batch_of(processor, shapes, packing))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        assert all(gradient.abs().sum() > 0 for gradient in found.values())
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("method", ["dora", "adalora", "ia3"])
def test_other_methods_pack_too(built, shapes, method):
    model, processor = built("llama", METHODS[method])
    losses = [gradients_of(model, batch_of(processor, shapes, packing))[0] for packing in ("none", "trie")]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gemma3"])
@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_the_plain_loss_is_the_packed_one(built, shapes, method, family, side):
    model, processor = built(family, METHODS[method])
    batch = batch_of(processor, shapes, "trie")
    image, end = model.config.image_token_id, 2
    rows = [[image, image, *processor.encode_target("<image>", text)] for text in TEXTS] * 2
    width = max(map(len, rows))
    padding = [[end] * (width - len(row)) for row in rows]
    joined = [pad + row if side == "left" else row + pad for row, pad in zip(rows, padding, strict=True)]
    held = [[0] * len(pad) + [1] * len(row) for row, pad in zip(rows, padding, strict=True)]
    mask = torch.tensor(held if side == "left" else [row[::-1] for row in held])
    ids = torch.tensor(joined)
    labels = ids.masked_fill((mask == 0) | (ids == image), -100)
    with torch.no_grad():
        pictures = batch["pixel_values"].repeat_interleave(len(TEXTS), 0)
        output = model(input_ids=ids, attention_mask=mask, pixel_values=pictures, labels=labels)
        assert output.logits.shape[:2] == ids.shape
        assert int((labels >= 0).sum()) == batch["packed"].num_tokens
        torch.testing.assert_close(output.loss, model(**batch).loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_generation_in_batches_is_generation_one_by_one(built, pixels, method, family):
    model, processor = built(family, METHODS[method])
    inputs = inputs_of(processor, PROMPTS, pixels)
    for options in ({}, {"num_beams": 3}, {"num_beams": 3, "output_logits": True, "return_dict_in_generate": True}):
        options = {"max_new_tokens": 6, "do_sample": False, **options}
        together = model.generate(**inputs, **options)
        together = together if torch.is_tensor(together) else together.sequences
        start = 0
        for prompt, row in zip(PROMPTS, together, strict=True):
            count = prompt.count("<image>")
            alone = model.generate(**inputs_of(processor, [prompt], pixels[start : start + count]), **options)
            alone = (alone if torch.is_tensor(alone) else alone.sequences)[0]
            assert row[: len(alone)].tolist() == alone.tolist()
            start += count


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_greedy_generation_reads_the_same_as_one_pass(built, pixels, method):
    model, processor = built("llama", METHODS[method])
    inputs = inputs_of(processor, PROMPTS[1:2], pixels[:1])
    new = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    ids = torch.cat([inputs["input_ids"], new], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels[:1]).logits
    assert torch.equal(logits[:, -6:-1].argmax(-1), new)


@pytest.mark.parity
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_virtual_tokens_give_the_logits_of_peft(built, lm_of, pixels, tmp_path, method, family):
    from peft import PeftModel

    model, processor = built(family, METHODS[method])
    model.save_pretrained(tmp_path)
    inputs = inputs_of(processor, PROMPTS[1:2], pixels[:1])
    with torch.no_grad():
        embeds = model.embed(inputs["input_ids"], model.prefix(pixels[:1]))
        ours = model(**inputs).logits
        base = AutoModelForCausalLM.from_pretrained(lm_of(family))
        theirs = PeftModel.from_pretrained(base, tmp_path / "language_adapter").eval()
        expected = theirs(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(ours, expected[:, -ours.shape[1] :], rtol=1e-4, atol=1e-4)


def test_the_cache_counts_texts_only(built, pixels):
    for override in (PREFIX, PROMPT):
        model, processor = built("llama", override)
        inputs = inputs_of(processor, PROMPTS[:1], pixels[:1])
        with torch.no_grad():
            first = model(**inputs, use_cache=True)
            length = inputs["input_ids"].shape[1]
            assert first.past_key_values.get_seq_length() == length
            whole = torch.cat([inputs["input_ids"], torch.tensor([[7, 8]])], dim=1)
            mask = torch.ones_like(whole)
            following = model(
                input_ids=whole[:, length:],
                attention_mask=mask,
                past_key_values=first.past_key_values,
            )
            again = model(input_ids=whole, attention_mask=mask, pixel_values=pixels[:1])
            cache = first.past_key_values
            cache.crop(-2)
            cut = model(input_ids=whole[:, length:], attention_mask=mask, past_key_values=cache)
        assert torch.equal(cut.logits, following.logits)
        torch.testing.assert_close(following.logits, again.logits[:, length:], rtol=1e-4, atol=1e-4)
        bare = AutoModelForCausalLM.from_pretrained(model.language_model.name_or_path)
        foreign = bare(torch.tensor([[5, 6]]), use_cache=True).past_key_values
        with pytest.raises(ConfigError, match="made without the virtual tokens"):
            model.language_model(torch.tensor([[5]]), past_key_values=foreign)


@pytest.mark.parametrize("fusion", ["deep_prefix", "cross_attention", "adapters", "residual"])
@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "prompt_tuning"])
def test_methods_combine_with_every_fusion(built, shapes, pixels, method, fusion):
    options = ", every: 1" if fusion == "cross_attention" else ""
    model, processor = built("llama", METHODS[method], f"model.fusion={{type: {fusion}{options}}}")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.fusion.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    losses = [model(**batch_of(processor, shapes, packing)).loss for packing in ("none", "trie")]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    inputs = inputs_of(processor, PROMPTS[:3], pixels[:3])
    together = model.generate(**inputs, max_new_tokens=4, num_beams=2)
    alone = model.generate(**inputs_of(processor, PROMPTS[1:2], pixels[1:2]), max_new_tokens=4, num_beams=2)[0]
    assert together[1, : len(alone)].tolist() == alone.tolist()


def test_disabled_adapters_leave_the_bare_model(built, pixels):
    plain, _ = built("llama", fresh=True)
    for method in METHODS.values():
        model, processor = built("llama", method)
        plain.load_trainable(model.trainable_state())
        adapted = logits_of(model, processor, pixels)
        with model.adapters_disabled():
            assert torch.equal(logits_of(model, processor, pixels), logits_of(plain, processor, pixels))
        assert torch.equal(logits_of(model, processor, pixels), adapted)
        assert not torch.allclose(adapted, logits_of(plain, processor, pixels), atol=1e-2)


# ── freezing and merging ──


@pytest.mark.parametrize("method", METHODS)
def test_training_changes_the_adapter_and_no_bit_around_it(built, shapes, method):
    dropout = METHODS[method].replace("type: lora", "type: lora, lora_dropout: 0.5")
    model, processor = built("gpt2", dropout, fresh=True)
    own = model.adapter_parameters()
    base = {n: p for n, p in model.language_model.named_parameters() if id(p) not in own}
    base |= dict(model.language_model.named_buffers())
    assert not any(p.requires_grad for p in base.values())
    before = hash_tensors(base)
    first = {n: p.detach().clone() for n, p in model.adapters["language_model"].named_parameters().items()}
    expected = sum(p.numel() for p in first.values()) + sum(p.numel() for p in model.mapper.parameters())
    assert count_parameters(model).trainable == expected
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    model.train()
    model.set_total_steps(4)
    batch = batch_of(processor, shapes, "trie")
    for step in range(1, 3):
        model(**batch).loss.backward()
        assert all(p.grad is None for p in base.values())
        optimizer.step()
        model.update_adapters(step)
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
    own = model.adapter_parameters()
    base = {n: p for n, p in model.language_model.named_parameters() if id(p) not in own}
    before = hash_tensors(base)
    model.merge_adapters()
    assert hash_tensors(base) != before
    scale = float(adapted.abs().max())
    torch.testing.assert_close(logits_of(model, processor, pixels), adapted, rtol=1e-5, atol=1e-5 * scale)
    with pytest.raises(ConfigError, match=r"call unmerge_adapters\(\) first"):
        model.train()
    model.unmerge_adapters()
    assert hash_tensors(base) == before
    assert torch.equal(logits_of(model, processor, pixels), adapted)


def test_virtual_tokens_cannot_be_merged(built):
    with pytest.raises(ConfigError, match="virtual tokens have no weights"):
        built("llama", PREFIX)[0].merge_adapters()


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
        embeds = model.embed(inputs_of(processor, PROMPTS[:1], None)["input_ids"], model.prefix(pixels[:1]))
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
    with pytest.raises(CheckpointError, match=r"holds language_adapter/, and its config\.json no peft method"):
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
        embeds = plain.embed(inputs_of(processor, PROMPTS[:1], None)["input_ids"], plain.prefix(pixels[:1]))
        expected = own(inputs_embeds=embeds).logits
    model = FrozenPrefixForConditionalGeneration(config, encoder, own).eval()
    model.load_trainable(plain.trainable_state())
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
    loaded.merge_adapters()
    torch.testing.assert_close(loaded.vision_encoder(pixels), expected, rtol=1e-4, atol=1e-5)


def test_features_of_an_adapted_encoder_cannot_be_cached(tiny_recipe, tmp_path):
    with pytest.raises(
        ConfigError, match=r"feature_cache: got 'auto', expected 'off' with model\.vision_encoder\.peft"
    ):
        tiny_recipe(tmp_path, VISION[0])
    with pytest.raises(ConfigError, match=r"model\.vision_encoder\.peft trains layers of its own"):
        tiny_recipe(tmp_path, *VISION, "model.vision_encoder.trainable=all")
    section = {"source": "timm", "name": "x", "peft": {"type": "lora"}}
    assert "peft" not in VisionEncoderConfig.model_validate(section).feature_fields()


def test_attention_that_peft_would_change_in_place_is_refused():
    from frozenprefix.models.peft.adapter import make_adapter

    block = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    with pytest.raises(ConfigError, match=r"torch\.nn\.MultiheadAttention, whose frozen weights peft changes"):
        make_adapter(block, PeftMethodConfig(type="lora", target_modules=["0"]), "vision_encoder")


# ── the rest ──


class StoppedHalfWay(Trainer):
    def _out_of_patience(self):
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


def test_quantised_weights_need_a_gpu_and_bitsandbytes(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = tiny_recipe(tmp_path, "model.language_model.quantization=4bit")
    with pytest.raises(ConfigError, match=r"quantization: got '4bit', which needs a CUDA GPU.*; use 'none' here"):
        build_model(recipe)
    with pytest.raises(ConfigError, match="quantization: got '3bit'"):
        tiny_recipe(tmp_path, "model.language_model.quantization=3bit")


@pytest.mark.parametrize("name", ["lora", "adalora", "prefix_tuning"])
def test_the_recipes_are_right(name):
    recipe = Recipe.load(Path(__file__).parents[1] / "recipes" / f"{name}.yaml")
    assert recipe.model.language_model.peft.type == name


@pytest.mark.slow
def test_peft_is_not_imported_before_it_is_asked_for():
    import subprocess

    code = "import sys, frozenprefix.models.modeling; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
