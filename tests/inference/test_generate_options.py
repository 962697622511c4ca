"""Options of `generate` are honoured or refused by name; lengths and padding are right for every LM."""

from __future__ import annotations

import pytest
import torch

from frozenprefix.errors import ConfigError, DataError
from frozenprefix.inference import Captioner, Classifier, Dialog
from frozenprefix.models.language_model import padding_token
from frozenprefix.training import train
from frozenprefix.training.setup import build_model
from tests.helpers.lm import TINY


@pytest.fixture
def path(shapes):
    return shapes / "images" / "red_circle.png"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_return_sequences": 2}, "num_return_sequences: a captioner returns one text"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate: a captioner returns one text"),
        ({"output_scores": True}, "output_scores: a captioner returns one text"),
        ({"num_beams": 0}, "num_beams: got 0, expected at least 1"),
        ({"num_beams": 2.5}, "num_beams: got 2.5, expected at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0, expected at least 1"),
        ({"inputs_embeds": None}, "inputs_embeds: a captioner computes it from prompts and images"),
        ({"streamer": None, "max_length": 3}, "streamer: .*\nmax_length: "),
    ],
)
def test_options_that_a_captioner_does_not_take(captioner, path, options, message):
    with pytest.raises(ConfigError, match=message):
        next(captioner.caption([path], **options))
    with pytest.raises(ConfigError, match=message):
        captioner.answer(path, "what is it?", **options)


def test_options_that_it_takes_still_act(captioner, path):
    torch.manual_seed(0)
    options = {"num_beams": 1, "do_sample": True, "temperature": 5.0, "max_new_tokens": 8}
    texts = {captioner.generate(["<image>"], [path], **options)[0].text for _ in range(4)}
    assert len(texts) > 1


# ── learned positions ──


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_run_out_with_a_message(tiny_recipe, tiny_lm, tmp_path, path, family):
    model, processor = build_model(tiny_recipe(tmp_path, lm=tiny_lm(family)))
    captioner, positions = Captioner(model, processor), TINY["positions"]
    assert model.lm.learned_positions == positions
    prompt = len(processor.encode_prompt("<image>"))
    most = positions - prompt + 1
    message = (
        rf"max_new_tokens: the prompt of {prompt} tokens and {most + 1} new ones are more than the {positions} .* "
    )
    for beams in (1, 2):
        captioner.generate(["<image>"], [path], num_beams=beams, max_new_tokens=most, min_new_tokens=most)
        with pytest.raises(ConfigError, match=message + f"there is room for {most} after it"):
            captioner.generate(["<image>"], [path], num_beams=beams, max_new_tokens=most + 1)
    with pytest.raises(ConfigError, match=r"more than the 128 learned positions of .*; shorten it"):
        captioner.answer(path, "what? " * 100)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_choices_run_out_of_learned_positions_with_a_message(tiny_recipe, tiny_lm, tmp_path, path, family):
    from frozenprefix.inference.likelihood import likeliest

    model, processor = build_model(tiny_recipe(tmp_path, lm=tiny_lm(family)))
    captioner = Captioner(model, processor)
    prefix = model.prefix(image_features=captioner.encoder([path]))
    assert likeliest(captioner, ["<image>Is it"], [["red", "blue"]], prefix) in (["red"], ["blue"])
    for prompt, choice in (("<image>" + "what? " * 100, "red"), ("<image>", "dog " * 120)):
        with pytest.raises(ConfigError, match=r"choices: the longest .* tokens .* more than the 128 learned positions"):
            likeliest(captioner, [prompt], [[choice, "blue"]], prefix)


def test_searched_texts_run_out_of_learned_positions_with_a_message(tiny_recipe, tiny_lm, tmp_path):
    from frozenprefix.inference import Embedder

    embedder = Embedder(*build_model(tiny_recipe(tmp_path, "objectives.contrastive.weight=1", lm=tiny_lm("gpt2"))))
    assert len(embedder.embed_texts(["a dog"])) == 1
    with pytest.raises(ConfigError, match=r"encode_text: a text of \d+ tokens .* more than the 128 learned positions"):
        embedder.embed_texts(["why " * 200])


def test_other_positions_do_not_run_out(captioner, path):
    assert captioner.model.lm.learned_positions is None
    captioner.generate(["<image>"], [path], num_beams=1, max_new_tokens=TINY["positions"] + 5)


def test_positions_are_checked_before_the_first_step(tiny_recipe, tiny_lm, tmp_path):
    template = "Question: " + "so " * 80 + "{question} Answer:"
    recipe = tiny_recipe(tmp_path, f"data.prompts.vqa='{template}'", lm=tiny_lm("gpt2"))
    with pytest.raises(
        DataError, match=r"qa.jsonl:\d+.*: prompt and target take \d+ tokens, but .* learned 128 positions"
    ):
        train(recipe)
    assert not (tmp_path / "last").exists()


# ── padding ──


@pytest.mark.parametrize("images", [3, 1])
@pytest.mark.parametrize("beams", [1, 2])
def test_padding_outside_the_vocabulary(captioner, shapes, beams, images):
    """Three texts of a batch, about three images or one, of which some end early and are padded."""
    processor = captioner.processor
    paths = (sorted((shapes / "images").iterdir())[:images] * 3)[:3]
    prompts = ["<image>", "<image> the dog", "<image> a"]
    words = captioner.model.get_input_embeddings().num_embeddings
    logits = captioner.generate(prompts, paths, num_beams=beams, max_new_tokens=6)
    first = processor.tokenizer(logits[0].text, add_special_tokens=False)["input_ids"]
    options = {"num_beams": beams, "max_new_tokens": 6, "eos_token_id": [first[1], 2]}  # ends early for the first image
    expected = captioner.generate(prompts, paths, **options)
    before = processor.tokenizer.pad_token
    try:
        processor.tokenizer.add_special_tokens({"pad_token": "<padding>"})
        assert processor.tokenizer.pad_token_id >= words > padding_token(captioner.model, processor.tokenizer)
        assert captioner.generate(prompts, paths, **options) == expected
    finally:
        processor.tokenizer.pad_token = before


# ── given features ──


def test_dialogs_and_classifiers_take_features(captioner, path):
    model, processor = captioner.model, captioner.processor
    features = captioner.encoder([path])
    by_file, by_features = Dialog(model, processor), Dialog(model, processor)
    for text, images in (("what is it?", True), ("and its color?", False)):
        one = by_file.ask(text, [path] if images else (), max_new_tokens=5)
        other = by_features.ask(text, features if images else (), max_new_tokens=5)
        assert one == other
    with pytest.raises(DataError, match="got 2 <image> marks and 1 images"):
        by_features.ask("<image><image>which?", features)
    labels = ["circle", "square", "dog"]
    classifier = Classifier(model, processor)
    torch.testing.assert_close(classifier.scores(features, labels), classifier.scores([path], labels))
