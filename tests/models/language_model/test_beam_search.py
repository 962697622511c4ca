"""This package's beam search against transformers', and its pieces by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from frozenprefix.models.language_model import DecoderOnlyLM
from frozenprefix.models.language_model.beam_search import (
    BeamOptions,
    BeamSearch,
    beam_options,
    log_normaliser,
    top_tokens,
)
from frozenprefix.models.language_model.trie_reader import Prompts, TrieReader
from frozenprefix.models.packing import pack_prompts
from tests.helpers.lm import tiny_lm_config

FAMILIES = ["gpt2", "opt", "gpt_neox", "llama", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3"]
MANY_ENDS = [2, *range(40, 90)]  # random models seldom hit a single end token
CASES = {
    "no end": {"eos_token_id": None},
    "many ends": {"eos_token_id": MANY_ENDS},
    "early": {"eos_token_id": MANY_ENDS, "early_stopping": True, "length_penalty": 0.6},
    "never": {"eos_token_id": MANY_ENDS[:20], "early_stopping": "never", "num_return_sequences": 2},
    "short": {"eos_token_id": 2, "max_new_tokens": 1},
}
BASE = {"num_beams": 3, "max_new_tokens": 8, "pad_token_id": 2, "do_sample": False}


@pytest.fixture(scope="module")
def random_lm():
    made = {}

    def make(family):
        if family not in made:
            torch.manual_seed(0)
            made[family] = AutoModelForCausalLM.from_config(tiny_lm_config(family)).eval()
            with torch.no_grad():  # words that depend on more than the last one
                for parameter in made[family].parameters():
                    if parameter.ndim > 1:
                        parameter *= 6
        return made[family]

    return make


def prompts(lm):
    """Five prompts of six embeddings; two of them are shorter, with padding on the left."""
    ids = torch.randint(3, 300, (5, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(5, 6, dtype=torch.long)
    mask[1, :2] = mask[3, :4] = 0
    return lm.get_input_embeddings()(ids).detach(), mask


def search(lm, embeds, mask, **options):
    found = beam_options(lm, BASE | options)
    assert found is not None
    options = {"num_beams": found.num_beams, "new_tokens": found.max_new_tokens}
    reader = TrieReader(lm, lm.base_model, Prompts.from_mask(embeds, mask), **options)
    return BeamSearch(reader, DecoderOnlyLM(lm).logits, found)()


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(random_lm, family, case):
    lm = random_lm(family)
    embeds, mask = prompts(lm)
    options = BASE | CASES[case]
    expected = lm.generate(
        inputs_embeds=embeds, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **options
    )
    words, scores = search(lm, embeds, mask, **CASES[case])
    assert torch.equal(words, expected.sequences)
    torch.testing.assert_close(scores, expected.sequences_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("case", ["no end", "many ends", "short"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_beam_equals_transformers_greedy_search(random_lm, family, case):
    lm = random_lm(family)
    embeds, mask = prompts(lm)
    options = BASE | CASES[case] | {"num_beams": 1}
    words, scores = search(lm, embeds, mask, **CASES[case], num_beams=1)
    expected = [greedy_of_transformers(lm, embeds[i : i + 1], mask[i : i + 1], options) for i in range(len(embeds))]
    check_texts(words, scores, expected)


def greedy_of_transformers(lm, embeds, mask, options) -> tuple[list[int], float]:
    """Words of one prompt, and the mean of their log-probabilities."""
    found = lm.generate(
        inputs_embeds=embeds, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **options
    )
    steps = lm.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    return found.sequences[0].tolist(), steps.mean().item()


def check_texts(words, scores, expected):
    for found, score, (ids, value) in zip(words.tolist(), scores.tolist(), expected, strict=True):
        assert found[: len(ids)] == ids
        assert set(found[len(ids) :]) <= {BASE["pad_token_id"]}
        assert score == pytest.approx(value, rel=1e-5, abs=1e-5)


# two images with a prefix of three embeddings: five questions about the first one, of which the third begins the
# fourth and the last is the first again, and one about the second
QUESTIONS = [[[20, 21, 22], [20, 21, 23, 24], [25], [25, 26, 27], [20, 21, 22]], [[30, 31]]]


@pytest.mark.parity
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_that_share_a_row_equal_those_alone(random_lm, family, beams):
    lm = random_lm(family)
    images = lm.get_input_embeddings()(torch.arange(100, 106)).detach().view(2, 3, -1)
    options = BASE | {"num_beams": beams, "eos_token_id": MANY_ENDS}
    expected = []
    for image, questions in zip(images, QUESTIONS, strict=True):
        for question in questions:
            embeds = torch.cat([image, lm.get_input_embeddings()(torch.tensor(question))])[None]
            mask = torch.ones(embeds.shape[:2], dtype=torch.long)
            if beams == 1:
                expected.append(greedy_of_transformers(lm, embeds, mask, options))
                continue
            found = lm.generate(
                inputs_embeds=embeds, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **options
            )
            expected.append((found.sequences[0].tolist(), found.sequences_scores.item()))
    wrapped = DecoderOnlyLM(lm)
    groups = [[[299, 299, 299, *question] for question in questions] for questions in QUESTIONS]
    packed = pack_prompts(groups, image_token_id=299, prefix_length=3)
    assert packed.input_ids.shape[0] == 2
    embeds = lm.get_input_embeddings()(packed.input_ids).detach()
    embeds[packed.prefix_index >= 0] = images.flatten(0, 1)
    settings = wrapped.beam_options(7, options | {"return_dict_in_generate": True})
    found = wrapped.continue_rows(packed, embeds, settings)
    check_texts(found.sequences, found.sequences_scores, expected)


@pytest.mark.parametrize("beams", [1, 2])
def test_as_many_prompts_as_rows_need_not_be_one_in_each(random_lm, beams):
    """Ten rows, one of them with two prompts; another one is empty after the first word, and stays in the batch."""
    lm = random_lm("llama")
    wrapped = DecoderOnlyLM(lm)
    groups = [[[5 + row, 20 + row]] for row in range(10)]
    groups[0].append([5, 50])
    options = BASE | {"num_beams": beams, "return_dict_in_generate": True, "eos_token_id": None}

    def words(asked, **changes):
        packed = pack_prompts(asked, image_token_id=299, prefix_length=1, images_per_group=[0] * len(asked))
        settings = wrapped.beam_options(2, options | changes)
        return wrapped.continue_rows(packed, lm.get_input_embeddings()(packed.input_ids), settings).sequences.tolist()

    free = words(groups)
    ends = [row for row in range(4, 10) if sum(free[row + 1][0] in text[:3] for text in free) == 1]
    assert ends, "no word begins one text alone: the test shows nothing"
    end = {"eos_token_id": free[ends[0] + 1][0]}
    together = words(groups, **end)
    alone = [words([[prompt]], **end)[0] for group in groups for prompt in group]
    for found, expected in zip(together, alone, strict=True):
        assert found[: len(expected)] == expected


def test_of_equal_logits_the_first_word_is_taken():
    logits = torch.zeros(3, 64 * 30)
    logits[0, [700, 5, 1900]] = 1
    logits[1, [64, 63]] = 2
    assert top_tokens(logits, 1)[1].tolist() == [[5], [63], [0]]


def test_finished_images_leave_and_change_nothing(random_lm, monkeypatch):
    lm = random_lm("llama")
    embeds, mask = prompts(lm)
    options = {"eos_token_id": list(range(40, 120)), "max_new_tokens": 12, "early_stopping": True}
    sizes = []
    forward = TrieReader._forward
    monkeypatch.setattr(TrieReader, "_forward", lambda self, e, *rest: sizes.append(len(e)) or forward(self, e, *rest))
    together, scores = search(lm, embeds, mask, **options)
    assert sizes[0] == 5
    assert sizes[-1] < 5, "no image was finished before the others: the test shows nothing"
    for i in range(5):
        alone, score = search(lm, embeds[i : i + 1], mask[i : i + 1], **options)
        assert together[i, : alone.shape[1]].tolist() == alone[0].tolist()
        assert scores[i].item() == pytest.approx(score.item(), rel=1e-5)


def test_scores_are_the_mean_log_probability(random_lm):
    lm = random_lm("gpt2")
    embeds, mask = prompts(lm)
    words, scores = search(lm, embeds[:1], mask[:1], eos_token_id=None)
    whole = torch.cat([embeds[:1], lm.get_input_embeddings()(words)], dim=1)
    steps = lm(inputs_embeds=whole).logits[0, 5:-1].log_softmax(-1)
    assert scores.item() == pytest.approx(steps.gather(1, words[0, :, None]).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"num_beams": 1, "output_scores": True},
        {"repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 2},
        {"output_logits": True},
        {"min_new_tokens": 3},
        {"max_new_tokens": None},
        {"logits_processor": [1]},
    ],
)
def test_what_it_does_not_follow_is_left_to_transformers(random_lm, options):
    assert beam_options(random_lm("llama"), BASE | options) is None


def test_a_sliding_window_that_would_be_left_is_left_to_transformers(random_lm):
    lm = DecoderOnlyLM(random_lm("gemma3"))
    assert lm.beam_options(55, BASE) is not None
    assert lm.beam_options(57, BASE) is None


def test_options_are_read():
    lm = AutoModelForCausalLM.from_config(tiny_lm_config("llama"))
    made = beam_options(lm, {"num_beams": 4, "max_new_tokens": 5, "length_penalty": 2.0})
    assert made == BeamOptions(4, 5, end_tokens=(2,), pad_token=2, length_penalty=2.0)
    assert made.candidates == 8
    assert BeamOptions(4, 5, end_tokens=(1, 2, 3)).candidates == 16


@pytest.mark.parametrize("vocabulary", [100, 640, 64 * 30 + 17])
@pytest.mark.parametrize("count", [1, 7])
def test_top_tokens(vocabulary, count):
    logits = torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    logits[0, -1] = logits[1, 0] = 50
    value, word = top_tokens(logits, count)
    expected = logits.topk(count)
    assert torch.equal(value, expected.values)
    assert torch.equal(word, expected.indices)


def test_log_normaliser_of_bfloat16_is_float32():
    logits = torch.randn(70, 1000).bfloat16() * 5
    torch.testing.assert_close(log_normaliser(logits), logits.double().logsumexp(-1).float(), rtol=1e-6, atol=1e-5)
