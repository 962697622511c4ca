"""Captions and answers of a tiny checkpoint: order, batches, scores, ends, and the blind prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing

from frozenprefix.data.images import load_image
from frozenprefix.errors import BadImageError, ConfigError, DataError
from frozenprefix.inference import Captioner
from frozenprefix.models.language_model import end_tokens


@pytest.fixture(scope="module")
def captioner(tiny_checkpoint):
    return Captioner.from_pretrained(tiny_checkpoint, device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def paths(shapes):
    return sorted((shapes / "images").iterdir(), reverse=True)[:6]


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_come_in_order_whatever_the_batch(captioner, paths, beams):
    settings = {"num_beams": beams, "max_new_tokens": 6}
    captions = list(captioner.caption(paths, **settings))
    assert [caption.path for caption in captions] == paths
    assert len({caption.text for caption in captions}) > 1, "all captions are equal: this test proves nothing"
    alone = Captioner(captioner.model, captioner.processor, batch_size=1)
    for one, other in zip(captions, alone.caption(map(str, paths), **settings), strict=True):
        assert (one.path, one.text) == (other.path, other.text)
        assert one.score == pytest.approx(other.score, abs=1e-4)


def test_captions_are_made_when_they_are_asked_for(captioner, paths):
    captions = captioner.caption([*paths[:4], "nowhere.png"], num_beams=1, max_new_tokens=2)
    assert [next(captions).path for _ in range(4)] == paths[:4]
    with pytest.raises(BadImageError, match=r"nowhere\.png"):
        next(captions)


def test_the_prompt_changes_the_caption(captioner, paths):
    plain, prompted = (
        next(captioner.caption(paths[:1], prompt=prompt, num_beams=1, max_new_tokens=6)) for prompt in (None, "the dog")
    )
    assert plain.text != prompted.text


def log_probabilities(captioner, image, ids):
    """Of each of `ids` after the image, through the model's plain forward pass."""
    inputs = captioner.processor(images=image, text="<image>", return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    full = torch.cat([inputs["input_ids"], ids[None]], dim=1)
    with torch.no_grad():
        logits = captioner.model(input_ids=full, pixel_values=inputs["pixel_values"]).logits[0, start - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]


def greedy_ids(captioner, image, count):
    inputs = captioner.processor(images=image, text="<image>", return_tensors="pt")
    return captioner.model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=None)[0]


@pytest.mark.parametrize("beams", [1, 3])
def test_score_is_the_mean_log_probability_of_all_tokens(captioner, paths, beams):
    image = load_image(paths[0])
    made = captioner.generate(["<image>"], [image], num_beams=beams, max_new_tokens=5)[0]
    inputs = captioner.processor(images=image, text="<image>", return_tensors="pt")
    ids = captioner.model.generate(**inputs, num_beams=beams, max_new_tokens=5, do_sample=False)[0]
    assert made.text == captioner.processor.decode(ids)
    assert made.score == pytest.approx(log_probabilities(captioner, image, ids).mean().item(), abs=1e-4)


@pytest.fixture
def ends_with(captioner):
    """Let an id end texts: the tokenizer's end token, or one that only the LM's generation config knows."""
    words, config = captioner.processor.tokenizer, captioner.model.generation_config
    before = words.eos_token, config.eos_token_id

    def change(*, tokenizer: int | None = None, language_model: int | None = None):
        if tokenizer is not None:
            words.eos_token = words.convert_ids_to_tokens(tokenizer)
        config.eos_token_id = language_model

    yield change
    words.eos_token, config.eos_token_id = before


@pytest.mark.parametrize("side", ["tokenizer", "language_model"])
def test_texts_end_at_either_end_token_and_it_counts_in_the_score(captioner, paths, ends_with, side):
    images = [load_image(path) for path in paths[:3]]
    ids = greedy_ids(captioner, images[0], 4)
    end = ids[1].item()
    assert end != ids[0].item()
    ends_with(**{side: end})
    made = captioner.generate(["<image>"] * 3, images, max_new_tokens=4)[0]
    expected = log_probabilities(captioner, images[0], ids[:2]).mean().item()
    assert made.score == pytest.approx(expected, abs=1e-4), "padding behind the end counts, or the end does not"
    assert set(end_tokens(captioner.model, captioner.processor.tokenizer)) >= {end}


def test_a_sampled_text_has_no_score(captioner, paths):
    torch.manual_seed(0)
    made = list(captioner.caption(paths[:2], do_sample=True, top_p=0.9, num_beams=1, max_new_tokens=4))
    assert [caption.score for caption in made] == [None, None]


def test_answer_takes_a_path_or_a_image(captioner, paths):
    by_path = captioner.answer(paths[0], "what color is this?", max_new_tokens=4)
    by_image = captioner.answer(Image.open(paths[0]).convert("RGB"), "what color is this?", max_new_tokens=4)
    prompt = "<image>Question: what color is this? Answer:"
    by_hand = captioner.generate([prompt], [load_image(paths[0])], max_new_tokens=4, num_beams=1)[0].text
    assert by_path == by_image == by_hand


def test_features_made_earlier_give_the_same(captioner, paths):
    images = [load_image(path) for path in paths[:3]]
    pixels = captioner.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    features = captioner.model.encode(pixels)
    prompts = ["<image>", "<image> a", "<image> the dog"]
    assert captioner.generate(prompts, images, max_new_tokens=4) == captioner.generate(
        prompts, features, max_new_tokens=4
    )


def test_as_many_images_as_marks(captioner, paths):
    images = [load_image(path) for path in paths[:2]]
    with pytest.raises(DataError, match="images: got 2 for 1 <image> marks; every <image> in the text needs one image"):
        captioner.generate(["<image>"], images)
    with pytest.raises(DataError, match="images: got 1 for 2 <image> marks"):
        captioner.generate(["<image><image>"], images[:1])
    with pytest.raises(DataError, match="prompts: those of a group have 1 and 2 <image> marks"):
        captioner.generate_groups([["<image>", "<image><image>"]], images)


def test_max_length_is_refused(captioner, paths):
    with pytest.raises(ConfigError, match="give max_new_tokens instead"):
        next(captioner.caption(paths[:1], max_length=10))


# ── without an image ──


def test_blind_prompts(captioner):
    assert captioner.blind_prompt("<image>Question: who? Answer:") == "Question: who? Answer:"
    assert captioner.blind_prompt("<image>") == "<s>"
    assert captioner.blind_prompt("<image><image> ") == "<s>"
    assert captioner.blind_prompt("user\n<image>who?\nassistant\n") == "user\nwho?\nassistant\n"


def test_a_blind_prompt_has_one_start_token(tiny_checkpoint):
    captioner = Captioner.from_pretrained(tiny_checkpoint, device="cpu")
    tokenizer = captioner.processor.tokenizer
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert captioner.processor.encode_prompt(captioner.blind_prompt("<image>")) == [1]
    assert captioner.processor.encode_prompt(captioner.blind_prompt("<image>a"))[0] == 1


def test_blind_generation_knows_no_image(captioner, monkeypatch):
    seen = []
    generate = type(captioner.model).generate

    def spy(self, **inputs):
        seen.append(inputs)
        return generate(self, **inputs)

    monkeypatch.setattr(type(captioner.model), "generate", spy)
    made = captioner.generate(["<image>", "<image> dog"], max_new_tokens=3)
    assert len(made) == 2
    (inputs,) = seen
    assert inputs.get("pixel_values") is None
    assert inputs.get("image_features") is None
    assert not (inputs["packed"].input_ids == captioner.processor.image_token_id).any()


def test_paths_are_paths(captioner, paths):
    assert isinstance(next(captioner.caption([str(paths[0])], num_beams=1, max_new_tokens=1)).path, Path)
