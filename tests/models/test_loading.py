"""Loading and saving as transformers' users call them: arguments are honoured, or refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GenerationConfig,
    StoppingCriteria,
    TextIteratorStreamer,
)

from frozenprefix.errors import AssetError, CheckpointError, ConfigError
from frozenprefix.models.configuration import LanguageModelConfig
from frozenprefix.models.language_model import load_language_model
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from tests.helpers.lm import save_tiny_lm
from tests.helpers.peft import LORA, PREFIX, PROMPTS, inputs_of, logits_of

load = FrozenPrefixForConditionalGeneration.from_pretrained


@pytest.fixture
def pixels():
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# ── arguments ──


@pytest.mark.parametrize("value", [torch.bfloat16, "bfloat16"])
@pytest.mark.parametrize(
    ("how", "name"), [(load, "dtype"), (load, "torch_dtype"), (AutoModelForImageTextToText.from_pretrained, "dtype")]
)
def test_dtype_is_that_of_the_frozen_parts(tiny_checkpoint, how, name, value):
    model = how(tiny_checkpoint, **{name: value})
    frozen = [*model.vision_encoder.parameters(), *model.lm.parameters()]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.mapper.parameters())


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}, "auto"])
def test_device_map(tiny_checkpoint, device_map):
    expected = "cpu" if device_map != "auto" or not torch.accelerator.is_available() else "cuda"
    assert load(tiny_checkpoint, device_map=device_map).device.type == expected


def test_attention_and_generation_config(tiny_checkpoint):
    model = load(tiny_checkpoint, attn_implementation="eager", generation_config=GenerationConfig(max_new_tokens=2))
    assert model.language_model.config._attn_implementation == "eager"
    assert model.generation_config.max_new_tokens == 2


def test_a_cap_on_attention_is_kept(lm_of, tmp_path):
    folder = shutil.copytree(lm_of("gemma2"), tmp_path / "lm")
    config = LanguageModelConfig(path=str(folder))
    assert load_language_model(config)[0].config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match=r"language_model\.attn_implementation: got 'sdpa', which leaves out the cap"):
        load_language_model(config.model_copy(update={"attn_implementation": "sdpa"}))


def test_the_report_of_a_strict_loading_is_empty(tiny_checkpoint):
    model, report = load(tiny_checkpoint, output_loading_info=True)
    assert isinstance(model, FrozenPrefixForConditionalGeneration)
    assert not any(report.values())


def test_a_subfolder(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "best")
    assert load(tmp_path, subfolder="best").config.prefix_length == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devicemap": "cpu"}, r"devicemap: unknown argument \(did you mean 'device_map'\?\)"),
        ({"tp_plan": "auto"}, r"tp_plan: got 'auto', which has no effect here; remove it"),
        ({"use_safetensors": False}, r"use_safetensors: got False, which has no effect here"),
        ({"attn_implementation": "paged"}, r"attn_implementation: Input should be 'sdpa' or 'eager', got 'paged'"),
        ({"device_map": {"lm": 0, "mapper": "cpu"}}, r"device_map: got .*, expected one device for the whole model"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config: expected bitsandbytes"),
        ({"quantization_config": "int8"}, r"quantization_config: got 'int8', expected a BitsAndBytesConfig"),
        ({"load_in_4bit": True, "load_in_8bit": True}, r"load_in_4bit and load_in_8bit: got both"),
        ({"device_map": "disk"}, r"device_map: got 'disk', expected 'auto', or a device of this machine: cpu"),
        ({"device_map": {"": "cuda:99"}}, r"device_map: got 'cuda:99', expected 'auto', or a device of this machine"),
        ({"revision": "v2"}, r"revision: got 'v2', but a folder has no revisions"),
        ({"generation_config": {"num_beams": 2}}, r"generation_config: got .*, expected a GenerationConfig"),
        ({"language_model": 3}, r"language_model: got 3, expected a model, or the folder of one"),
        ({"vision_encoder": "vit"}, r"vision_encoder: got 'vit', expected a ready-made module"),
    ],
)
@pytest.mark.parametrize("how", [load, AutoModelForImageTextToText.from_pretrained])
def test_what_has_no_effect_is_refused_by_name(tiny_checkpoint, how, options, message):
    with pytest.raises(ConfigError, match=message):
        how(tiny_checkpoint, **options)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("how", [load, AutoModelForImageTextToText.from_pretrained, AutoModel.from_pretrained])
def test_attention_reaches_the_language_model(tiny_checkpoint, how, name):
    model = how(tiny_checkpoint, attn_implementation=name)
    assert {c._attn_implementation for c in (model.config, model.language_model.config)} == {name}


def test_what_the_auto_classes_put_into_the_config_is_refused_too(tiny_checkpoint):
    with pytest.raises(ConfigError, match="attn_implementation: Input should be 'sdpa' or 'eager', got 'flash_atten"):
        AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, attn_implementation="flash_attention_2")


def test_the_config_that_is_passed_stays_as_it_is(tiny_checkpoint):
    config = load(tiny_checkpoint).config
    load(tiny_checkpoint, config=config, dtype="bfloat16")
    assert config.language_model.dtype == config.vision_encoder.dtype == "float32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.bfloat16}, "dtype: got bfloat16, but the language_model that was passed has float32"),
        ({"attn_implementation": "eager"}, "attn_implementation: got 'eager'; load the language_model with it"),
        ({"load_in_8bit": True}, "load_in_8bit: has no effect on a language_model that was passed"),
    ],
)
def test_what_a_ready_made_part_cannot_follow_is_refused(tiny_checkpoint, sharp_lm, options, message):
    lm = AutoModelForCausalLM.from_pretrained(sharp_lm)
    with pytest.raises(ConfigError, match=message):
        AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, language_model=lm, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can hold quantised weights")
@pytest.mark.parametrize(
    "options",
    [{"load_in_8bit": True}, {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}],
)
def test_quantisation_is_asked_of_the_language_model(tiny_checkpoint, options):
    with pytest.raises(ConfigError, match=r"language_model\.quantization: got '(4|8)bit', which needs a CUDA GPU"):
        load(tiny_checkpoint, **options)


# ── generation ──


@pytest.mark.parametrize("own", [{"num_beams": 2}, {"do_sample": False}])
def test_a_replaced_or_edited_generation_config_counts_and_is_saved(built, pixels, tmp_path, own):
    model, processor = built("llama", "seed=4", fresh=True)
    inputs = inputs_of(processor, PROMPTS[:1], pixels[:1])
    model.generation_config = GenerationConfig(max_new_tokens=2, eos_token_id=None, pad_token_id=0, **own)
    assert model.generate(**inputs).shape == (1, 2)
    model.generation_config.max_new_tokens = 3
    assert model.generate(**inputs).shape == (1, 3)
    model.save_pretrained(tmp_path)
    assert load(tmp_path).generate(**inputs).shape == (1, 3)


@pytest.mark.parametrize(
    "name",
    ["assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "inputs_embeds", "guidance_scale"],
)
def test_arguments_that_need_token_ids_are_refused_by_name(built, pixels, name):
    model, processor = built("llama")
    value = model.language_model if name == "assistant_model" else torch.ones(1, 1, 32) if "embeds" in name else 2
    inputs = inputs_of(processor, PROMPTS[:1], pixels[:1])
    with pytest.raises(ConfigError, match=f"^generate: {name}: needs a prompt of token ids"):
        model.generate(**inputs, **{name: value})
    if hasattr(GenerationConfig(), name):
        with pytest.raises(ConfigError, match=f"^generate: {name}: needs a prompt of token ids"):
            model.generate(**inputs, generation_config=GenerationConfig(**{name: value}))


@pytest.mark.parametrize("by_position", [False, True])
def test_generation_configs_of_one_call(built, pixels, by_position):
    model, processor = built("llama")
    inputs = inputs_of(processor, PROMPTS[:1], pixels[:1])

    def generate(config):
        if by_position:
            return model.generate(inputs["input_ids"], config, pixel_values=inputs["pixel_values"])
        return model.generate(**inputs, generation_config=config)

    assert generate(GenerationConfig(max_new_tokens=3, eos_token_id=None, pad_token_id=0)).shape == (1, 3)
    with pytest.raises(ConfigError, match="max_length counts the image's prefix"):
        generate(GenerationConfig(max_length=9))
    with pytest.raises(ConfigError, match="generation_config: got dict, expected a GenerationConfig"):
        generate({"max_new_tokens": 3})


class StopAfterTwo(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= 2] * len(input_ids))


def test_streamers_stopping_criteria_and_logits_processors_act(built, pixels):
    model, processor = built("llama")
    inputs = {**inputs_of(processor, PROMPTS[:1], pixels[:1]), "max_new_tokens": 4, "eos_token_id": None}
    words = model.generate(**inputs)
    streamer = TextIteratorStreamer(processor.tokenizer)
    assert model.generate(**inputs, streamer=streamer).tolist() == words.tolist()
    assert "".join(streamer) == processor.tokenizer.decode(words[0])
    assert model.generate(**inputs, stopping_criteria=[StopAfterTwo()]).tolist() == words[:, :2].tolist()
    last = model.generate(**inputs, logits_processor=[lambda ids, scores: scores * 0 + torch.arange(scores.shape[1])])
    assert last.tolist() == [[299] * 4]


@pytest.mark.parametrize("beams", [1, 2])
def test_dicts_are_returned(built, pixels, beams):
    model, processor = built("llama")
    inputs = inputs_of(processor, PROMPTS[:1], pixels[:1])
    found = model.generate(**inputs, max_new_tokens=3, num_beams=beams, do_sample=False, return_dict_in_generate=True)
    assert found.sequences.tolist() == model.generate(**inputs, max_new_tokens=3, num_beams=beams).tolist()


def test_arguments_of_the_hub(built, tmp_path):
    model, _ = built("llama")
    model.save_pretrained(tmp_path, safe_serialization=True, max_shard_size="5GB", push_to_hub=False)
    assert (tmp_path / "model.safetensors").is_file()
    with pytest.raises(ConfigError, match=r"save_pretrained: safe_serialization=False: has no effect"):
        model.save_pretrained(tmp_path, safe_serialization=False)


# ── checkpoints that move ──


def test_a_checkpoint_and_its_language_model_move_together(built, pixels, tmp_path):
    model, processor = built("llama", "seed=5", fresh=True)
    home = tmp_path / "home"
    lm = save_tiny_lm(home / "lm", "llama", sharpness=6.0)
    model.config.language_model = model.config.language_model.model_copy(update={"path": str(lm)})
    model.save_pretrained(home / "run" / "best")
    assert json.loads((home / "run/best/config.json").read_text())["language_model"]["path"] == "../../lm"
    home.rename(tmp_path / "elsewhere")
    moved = load(tmp_path / "elsewhere/run/best")
    assert torch.equal(logits_of(moved, processor, pixels), logits_of(model, processor, pixels))


def test_a_language_model_that_moved_alone_is_named(built, pixels, tmp_path):
    model, processor = built("llama", "seed=5", fresh=True)
    lm = save_tiny_lm(tmp_path / "lm", "llama", sharpness=6.0)
    model.config.language_model = model.config.language_model.model_copy(update={"path": str(lm)})
    model.save_pretrained(tmp_path / "best")
    lm.rename(tmp_path / "elsewhere")
    with pytest.raises(AssetError):
        load(tmp_path / "best")
    moved = load(tmp_path / "best", language_model=tmp_path / "elsewhere")
    assert torch.equal(logits_of(moved, processor, pixels), logits_of(model, processor, pixels))
    other = save_tiny_lm(tmp_path / "other", "qwen2")
    with pytest.raises(CheckpointError, match="language_model: this checkpoint was trained with"):
        load(tmp_path / "best", language_model=str(other))


@pytest.mark.parametrize("how", [load, AutoModelForImageTextToText.from_pretrained])
def test_a_ready_made_language_model(tiny_checkpoint, sharp_lm, how):
    lm = AutoModelForCausalLM.from_pretrained(sharp_lm)
    model = how(tiny_checkpoint, language_model=lm)
    assert model.language_model is lm


def test_another_language_model_is_refused(tiny_checkpoint, lm_of):
    lm = AutoModelForCausalLM.from_pretrained(lm_of("qwen2"))
    with pytest.raises(CheckpointError, match=r"trained with architecture='Llama.*Qwen"):
        load(tiny_checkpoint, language_model=lm)


# ── merged adapters ──


def test_an_unloaded_adapter_is_part_of_the_language_model(built, pixels, tmp_path):
    model, processor = built("llama", LORA, "seed=3", fresh=True)
    expected = logits_of(model, processor, pixels)
    model.unload_adapters()
    torch.testing.assert_close(logits_of(model, processor, pixels), expected, rtol=1e-4, atol=1e-4)
    assert not model.adapters
    with pytest.raises(ConfigError, match="self_contained=True"):
        model.save_pretrained(tmp_path / "short")
    model.language_model.save_pretrained(tmp_path / "lm")
    AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    model.save_pretrained(tmp_path / "full", self_contained=True)
    (tmp_path / "full").rename(tmp_path / "moved")
    loaded = load(tmp_path / "moved")
    assert torch.equal(logits_of(loaded, processor, pixels), logits_of(model, processor, pixels))


def test_virtual_tokens_and_bare_models_have_nothing_to_unload(built):
    with pytest.raises(ConfigError, match="virtual tokens have no weights"):
        built("llama", PREFIX, "seed=3")[0].unload_adapters()
    with pytest.raises(ConfigError, match="language_model: has no adapter to unload"):
        built("llama")[0].unload_adapters()
