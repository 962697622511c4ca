"""Samples of a prompt that share its row: drawn from the LM's own distribution, each by itself."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from frozenprefix.models.language_model import DecoderOnlyLM
from frozenprefix.models.language_model.beam_search import beam_options
from tests.helpers.lm import tiny_lm_config
from tests.models.language_model.test_beam_search import prompts

WHOLE = {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 2}


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_lm_config("llama")).requires_grad_(False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 6
    return model


def draw(lm, samples: int, **options):
    embeds, mask = prompts(lm)
    found = beam_options(lm, WHOLE | {"num_return_sequences": samples, "max_new_tokens": 6} | options)
    assert found is not None
    wrapped = DecoderOnlyLM(lm)
    return wrapped.generate(embeds, mask, beams=found), found


def test_only_the_whole_distribution_is_sampled_here(lm):
    assert beam_options(lm, WHOLE | {"max_new_tokens": 3}).sampled
    cuts = [{"top_k": 50}, {"temperature": 0.7}, {"top_p": 0.9}, {"min_p": 0.1}, {"typical_p": 0.5}]
    cuts += [{"epsilon_cutoff": 0.01}, {"eta_cutoff": 0.01}]
    for changes in (*cuts, {"num_beams": 2}, {"output_scores": True}):
        assert beam_options(lm, WHOLE | {"max_new_tokens": 3} | changes) is None, changes
    assert beam_options(lm, {"do_sample": True, "max_new_tokens": 3}) is None, "transformers cuts off by default"


@pytest.mark.parametrize("ends", [None, list(range(40, 300))])
def test_scores_are_those_of_the_words(lm, ends):
    torch.manual_seed(1)
    embeds, mask = prompts(lm)
    words = draw(lm, 3, eos_token_id=ends)[0]
    assert words.shape[0] == 15
    options = beam_options(
        lm,
        WHOLE | {"num_return_sequences": 3, "max_new_tokens": 6, "eos_token_id": ends, "return_dict_in_generate": True},
    )
    torch.manual_seed(1)
    output = DecoderOnlyLM(lm).generate(embeds, mask, beams=options)
    assert torch.equal(output.sequences, words), "the same seed draws the same"
    for number, (ids, score) in enumerate(zip(words.tolist(), output.sequences_scores.tolist(), strict=True)):
        end = next((place for place, word in enumerate(ids) if word in (ends or ())), len(ids) - 1)
        written = torch.tensor(ids[: end + 1])
        assert set(ids[end + 1 :]) <= {2}, "padded after the end"
        prompt = embeds[number // 3, mask[number // 3] == 1]
        whole = torch.cat([prompt, lm.get_input_embeddings()(written)])[None]
        logits = lm(inputs_embeds=whole, use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, written[:, None]).mean()
        assert score == pytest.approx(expected.item(), abs=1e-4)


def test_words_come_as_often_as_they_are_likely(lm):
    torch.manual_seed(2)
    embeds, _ = prompts(lm)
    count = 4000
    words = draw(lm, count, max_new_tokens=1)[0].view(len(embeds), count)
    chances = lm(inputs_embeds=embeds[:1], use_cache=False).logits[0, -1].softmax(-1)
    found = torch.bincount(words[0], minlength=len(chances)) / count
    assert (found - chances).abs().max() < 5 * (0.25 / count) ** 0.5
    assert len(words[0].unique()) > 3


def test_samples_of_a_prompt_go_on_by_themselves(lm):
    torch.manual_seed(3)
    words = draw(lm, 8)[0].view(5, 8, -1)
    assert all(len({tuple(text) for text in each.tolist()}) > 4 for each in words)


def test_transformers_is_not_asked(lm, monkeypatch):
    monkeypatch.setattr(type(lm), "generate", None)
    assert isinstance(draw(lm, 2)[0], torch.Tensor)
