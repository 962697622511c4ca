"""Prepacked weights while a text is generated: the same words, and copies that are kept until the weights change."""

from __future__ import annotations

import gc

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from frozenprefix.kernels import linear, llama_reading, prepack, prepackable_dtypes
from frozenprefix.kernels.llama_reading import layers_to_read
from frozenprefix.kernels.prepack import prepacked_frozen_weights, prepacked_to_generate
from frozenprefix.models.language_model.trie_reader import Prompts, TrieReader
from tests.kernels.test_llama_layer import WHOLE, random_lm
from tests.kernels.test_prepack import BF16
from tests.models.language_model.test_beam_search import CASES, prompts, search

pytestmark = pytest.mark.skipif(not prepackable_dtypes(), reason="PyTorch has no oneDNN here")


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """Grows by one for every layer that reads tokens as one function."""
    calls: list[int] = []
    read = llama_reading._read

    def counting(*args):
        calls.append(1)
        return read(*args)

    monkeypatch.setattr(llama_reading, "_read", counting)
    return calls


@pytest.fixture
def copies(monkeypatch) -> list[int]:
    """Grows by one for every copy of a weight."""
    made: list[int] = []
    pack = linear._prepack

    def counting(weight):
        made.append(1)
        return pack(weight)

    monkeypatch.setattr(linear, "_prepack", counting)
    return made


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", [*WHOLE, "gpt2", "gemma"])
def test_the_same_words_and_scores(family, case, reads):
    lm = random_lm(family)
    expected = search(lm, *prompts(lm), **CASES[case])
    assert not reads
    with prepacked_to_generate(lm):
        words, scores = search(lm, *prompts(lm), **CASES[case])
    assert torch.equal(words, expected[0])
    assert torch.allclose(scores, expected[1], atol=1e-4)
    assert bool(reads) == (family in WHOLE)


@pytest.mark.parametrize("changes", [{"head_dim": 16}, {"num_key_value_heads": 1}, {"attention_bias": True}])
def test_other_shapes_of_heads(changes, reads):
    lm = random_lm("llama", **changes)
    expected = search(lm, *prompts(lm), num_beams=3)
    with prepacked_to_generate(lm):
        words, _ = search(lm, *prompts(lm), num_beams=3)
    assert reads
    assert torch.equal(words, expected[0])


@pytest.mark.parametrize("dtype", [BF16])
def test_in_bfloat16_no_further_from_float32(dtype, reads):
    lm = random_lm("llama", dtype)
    embeds, mask = prompts(lm)
    plain = search(lm, embeds, mask, num_beams=1)[1]
    with prepacked_to_generate(lm):
        found = search(lm, embeds, mask, num_beams=1)[1]
    exact = search(lm.float(), embeds.float(), mask, num_beams=1)[1]
    assert reads
    assert (found - exact).norm() < 2 * (plain - exact).norm() + 0.02 * exact.norm()


def test_copies_are_kept_and_made_anew_for_other_weights(copies):
    lm = random_lm("llama")
    embeds, mask = prompts(lm)

    def write():
        copies.clear()
        with prepacked_to_generate(lm):
            return search(lm, embeds, mask)[0]

    first = write()
    assert copies, "the first text needs copies"
    assert torch.equal(write(), first)
    assert not copies
    for change in ("in place", "through .data"):
        weight = lm.model.layers[0].mlp.up_proj.weight
        if change == "in place":
            with torch.no_grad():
                weight.neg_()
        else:
            weight.data += 0.5  # as peft merges an adapter
        expected = search(lm, embeds, mask)[0]
        assert torch.equal(write(), expected), change
        assert copies, change


def test_a_module_put_in_later_is_not_passed_by():
    lm = random_lm("llama")
    embeds, mask = prompts(lm)
    with prepacked_to_generate(lm):
        before = search(lm, embeds, mask)[1]
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), lm)
    expected = search(lm, embeds, mask)[1]
    assert not torch.allclose(expected, before, atol=1e-3)
    with prepacked_to_generate(lm):
        assert torch.allclose(search(lm, embeds, mask)[1], expected, atol=1e-4)


def test_a_search_outlives_its_block():
    """As where two threads write with one model, and the first to end takes the copies out."""
    lm = random_lm("llama")
    embeds, mask = prompts(lm)
    texts = Prompts.from_mask(embeds, mask)
    with prepacked_to_generate(lm):
        reader = TrieReader(lm, lm.model, texts, num_beams=1, new_tokens=1)
    assert not layers_to_read(lm.model)
    own = TrieReader(lm, lm.model, texts, num_beams=1, new_tokens=1)
    assert (len(reader.read_layers), len(own.read_layers)) == (len(lm.model.layers), 0)
    with torch.no_grad():
        assert torch.allclose(reader.read_prompts(), own.read_prompts(), atol=1e-4)


def test_nothing_is_left_behind():
    gc.collect()  # models of other tests
    lm = random_lm("llama")
    before = len(prepack._KEPT)
    with pytest.raises(ZeroDivisionError), prepacked_to_generate(lm):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in lm.modules())
    assert len(prepack._KEPT) == before + 1
    del lm
    gc.collect()
    assert len(prepack._KEPT) == before, "the copies go with the model"


def test_inside_training_its_copies_serve(copies, reads):
    lm = random_lm("llama")
    embeds, mask = prompts(lm)
    expected = search(lm, embeds, mask)[0]
    layer = lm.model.layers[0]
    with prepacked_frozen_weights(lm):
        search(lm, embeds, mask)
        copies.clear()
        with prepacked_to_generate(lm):
            assert torch.equal(search(lm, embeds, mask)[0], expected)
        assert not copies
        assert "forward" in vars(layer), "the training goes on with them"
    assert reads


def test_a_hook_sees_every_token(reads):
    lm = random_lm("llama")
    embeds, mask = prompts(lm)
    seen = []
    lm.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    with prepacked_to_generate(lm):
        search(lm, embeds, mask)
    assert not reads
    assert len(seen) > 1
