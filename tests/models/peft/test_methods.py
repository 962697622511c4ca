"""peft methods: their options, packed rows against plain ones, generation, every fusion."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from frozenprefix.config import load_recipe, recipe_from_dict
from frozenprefix.errors import ConfigError
from frozenprefix.kernels.compat import CACHE
from frozenprefix.models.peft import validate_peft
from frozenprefix.models.section import PeftMethodConfig
from frozenprefix.models.state_dict import copy_into
from frozenprefix.training.setup import build_model
from tests.helpers import ROOT
from tests.helpers.peft import LM, METHODS, PREFIX, PROMPT, PROMPTS, TEXTS, batch_of, gradients_of, inputs_of, logits_of
from tests.helpers.recipes import tiny_recipe_dict

FAMILIES = ["gpt2", "opt", "llama", "qwen3", "gemma", "gemma3"]
# peft asks transformers under an old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


# ── options ──


def test_a_recipe_reports_all_wrong_options_at_once(tiny_lm, shapes, tmp_path):
    data = tiny_recipe_dict(tiny_lm("llama"), shapes, tmp_path)
    data["model"]["language_model"]["peft"] = {"type": "lora", "rank": 2, "lora_dropuot": 0.1, "lora_alpha": "big"}
    data["model"]["vision_encoder"]["peft"] = {"type": "prompt_tuning"}
    with pytest.raises(ConfigError) as caught:
        recipe_from_dict(data)
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
        ({"type": "dora", "r": 0}, "peft.r: Input should be greater than or equal to 1, got 0"),
        ({"type": "dora", "rank": 2}, "peft.rank: peft method 'dora' has no such option; it has: r, target_modules, "),
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
        if name in ("lora", "dora", "adalora"):
            differ = {key for key in ours if ours[key].default != theirs[key].default}
            assert differ <= {"rank_pattern", "alpha_pattern"}  # None for an empty dict


def test_dora_takes_ranks_by_module_as_lora_does(built):
    options = "r: 2, target_modules: [q_proj, v_proj], rank_pattern: {v_proj: 3}, alpha_pattern: {v_proj: 6}"
    for method, has_lengths in (("lora", False), ("dora", True)):
        model, _ = built("llama", LM + f"{{type: {method}, {options}}}")
        parameters = model.adapters["language_model"].named_parameters()
        ranks = {(name.split(".lora_")[0].split(".")[-1], len(p)) for name, p in parameters.items() if "lora_A" in name}
        assert ranks == {("q_proj", 2), ("v_proj", 3)}
        assert any("magnitude" in name for name in parameters) is has_lengths


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


def test_quantised_weights_need_a_gpu_and_bitsandbytes(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = tiny_recipe(tmp_path, "model.language_model.quantization=4bit")
    with pytest.raises(ConfigError, match=r"quantization: got '4bit', which needs a CUDA GPU.*; use 'none' here"):
        build_model(recipe)
    with pytest.raises(ConfigError, match="quantization: got '3bit'"):
        tiny_recipe(tmp_path, "model.language_model.quantization=3bit")


@pytest.mark.parametrize("name", ["lora", "adalora", "prefix_tuning"])
def test_the_recipes_are_right(name):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    assert recipe.model.language_model.peft.type == name


@pytest.mark.slow
def test_peft_is_not_imported_before_it_is_asked_for():
    import subprocess

    code = "import sys, frozenprefix.models.modeling; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
        images = batch["pixel_values"].repeat_interleave(len(TEXTS), 0)
        output = model(input_ids=ids, attention_mask=mask, pixel_values=images, labels=labels)
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
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # peft's own call
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_virtual_tokens_give_the_logits_of_peft(built, lm_of, pixels, tmp_path, method, family):
    from peft import PeftModel

    model, processor = built(family, METHODS[method])
    model.save_pretrained(tmp_path)
    inputs = inputs_of(processor, PROMPTS[1:2], pixels[:1])
    with torch.no_grad():
        embeds = model.fuse(inputs["input_ids"], model.prefix(pixels[:1]))[0]
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
            assert first.cache.get_seq_length() == length
            whole = torch.cat([inputs["input_ids"], torch.tensor([[7, 8]])], dim=1)
            mask = torch.ones_like(whole)
            following = model(
                input_ids=whole[:, length:],
                attention_mask=mask,
                cache=first.cache,
            )
            again = model(input_ids=whole, attention_mask=mask, pixel_values=pixels[:1])
            cache = first.cache
            cache.crop(-2)
            cut = model(input_ids=whole[:, length:], attention_mask=mask, cache=cache)
        assert torch.equal(cut.logits, following.logits)
        torch.testing.assert_close(following.logits, again.logits[:, length:], rtol=1e-4, atol=1e-4)
        bare = AutoModelForCausalLM.from_pretrained(model.language_model.name_or_path)
        foreign = bare(torch.tensor([[5, 6]]), use_cache=True).get(CACHE)
        with pytest.raises(ConfigError, match="filled without the virtual tokens"):
            model.language_model(torch.tensor([[5]]), **{CACHE: foreign})


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
        copy_into(plain.trainable_state(), model.trainable_state(), "model")
        adapted = logits_of(model, processor, pixels)
        with model.adapters.disabled():
            assert torch.equal(logits_of(model, processor, pixels), logits_of(plain, processor, pixels))
        assert torch.equal(logits_of(model, processor, pixels), adapted)
        assert not torch.allclose(adapted, logits_of(plain, processor, pixels), atol=1e-2)
