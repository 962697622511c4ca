"""Messages of evaluation tools: prompts, order of images, options, batches."""

from __future__ import annotations

import logging

import pytest

from frozenprefix.errors import ConfigError, DataError
from frozenprefix.interop import Answerer, FrozenPrefixVLM, Request
from frozenprefix.interop.vlmevalkit import to_messages
from tests.helpers.drawings import draw_shape

RED, BLUE = draw_shape("red", "circle"), draw_shape("blue", "square")


def user(*parts):
    """A turn of texts and images."""
    kinds = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": "user", "content": kinds}


@pytest.mark.parametrize(
    ("kind", "messages", "expected"),
    [
        ("vqa", [user(RED, "what color?")], "<image>Question: what color? Answer:"),
        (
            "vqa",
            [user("what color?", RED, " And what shape? ")],
            "<image>Question: what color?\nAnd what shape? Answer:",
        ),
        (
            "vqa",
            [{"role": "system", "content": "Be brief."}, user(RED, BLUE, "same?")],
            "<image><image>Question: same? Answer:",
        ),
        ("vqa", [{"role": "user", "content": "why?"}], "Question: why? Answer:"),
        ("caption", [user(RED, "Provide a one-sentence caption.")], "<image>"),
        ("chat", [user("look:", RED, "what is it?")], "Question: look:<image>what is it? Answer:"),
    ],
)
def test_prompts(captioner, kind, messages, expected):
    prompt, images = Answerer(captioner, kind).prompt(messages)
    assert prompt == expected
    assert prompt.count("<image>") == len(images)


def test_an_image_mark_in_a_text_is_text(captioner):
    for kind in ("vqa", "chat"):
        prompt, images = Answerer(captioner, kind).prompt([user(RED, "what is <image> here?")])
        ids = captioner.processor.encode_prompt(prompt)
        assert ids.count(captioner.processor.image_token_id) == captioner.processor.prefix_length * len(images)


def test_answers_equal_those_of_the_captioner_in_any_order_and_batch(captioner):
    answerer = Answerer(captioner)
    short, long = {"max_new_tokens": 2, "temperature": 0}, {"max_new_tokens": 6, "num_beams": 2}
    questions = ["what color?", "what shape?", "is it red?", "is it blue?", "what is it?"]
    requests = [
        Request([user(RED if n % 2 else BLUE, text)], short if n % 3 else long) for n, text in enumerate(questions)
    ]
    expected = [
        captioner.answer(RED if n % 2 else BLUE, text, max_new_tokens=2 if n % 3 else 6, num_beams=1 if n % 3 else 2)
        for n, text in enumerate(questions)
    ]
    assert answerer(requests) == expected


def test_several_images_and_none(captioner):
    both = Answerer(captioner)([Request([user(RED, BLUE, "same?")], {"max_new_tokens": 3})])
    assert both == [
        captioner.generate(["<image><image>Question: same? Answer:"], [RED, BLUE], max_new_tokens=3)[0].text
    ]
    blind = Answerer(captioner)([Request([user("why?")], {"max_new_tokens": 3})])
    assert blind == [captioner.generate(["Question: why? Answer:"], max_new_tokens=3)[0].text]


def test_a_text_ends_before_the_first_stop(captioner):
    messages = [user(RED, "what color?")]
    (whole,) = Answerer(captioner)([Request(messages, {"max_new_tokens": 8})])
    assert len(whole) >= 4
    stop = whole[len(whole) // 2 :][:2]
    (cut,) = Answerer(captioner)([Request(messages, {"max_new_tokens": 8, "until": ["\n\n\n", stop]})])
    assert cut == whole[: whole.index(stop)]
    assert Answerer(captioner)([Request(messages, {"max_new_tokens": 8, "until": stop})]) == [cut]


def test_options_without_effect_are_named_once(captioner, caplog):
    options = {"max_new_tokens": 1, "image_aspect_ratio": "pad", "top_p": 0.5, "temperature": 0}
    with caplog.at_level(logging.WARNING):
        Answerer(captioner)([Request([user(RED, text)], options) for text in "ab"])
    assert [record.getMessage() for record in caplog.records] == [
        "generation options without effect here: image_aspect_ratio"
    ]


def test_a_model_with_learned_positions_writes_no_more_than_it_can(built, shapes):
    from frozenprefix.inference import Captioner

    captioner = Captioner(*built("gpt2"))
    (text,) = Answerer(captioner)([Request([user(RED, "what?")], {"max_new_tokens": 16_384})])
    assert text


def test_wrong_values_are_named(captioner, tiny_checkpoint):
    with pytest.raises(ConfigError, match=r"prompt: got 'captoin', expected vqa or .* \(did you mean 'caption'\?\)"):
        Answerer.from_pretrained(tiny_checkpoint, prompt="captoin")
    with pytest.raises(DataError, match="message: got a part of type 'video', expected text or image"):
        Answerer(captioner)([Request([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}])])


# ── VLMEvalKit ──


def test_messages_of_vlmevalkit():
    image, text = {"type": "image", "value": "a.jpg"}, {"type": "text", "value": "what?"}
    parts = [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "what?"}]
    assert to_messages([image, text]) == [{"role": "user", "content": parts}]
    assert to_messages([image, "what?"]) == [{"role": "user", "content": parts}]
    assert to_messages(text) == to_messages("what?") == [{"role": "user", "content": parts[1:]}]
    for wrong in ({"type": "video", "value": "a.mp4"}, {"type": "text"}, 3):
        with pytest.raises(DataError, match="expected a text, or type 'text' or 'image' with a value"):
            to_messages([wrong])


def test_a_model_of_vlmevalkit_answers_as_the_captioner(tiny_checkpoint, captioner, shapes):
    model = FrozenPrefixVLM(tiny_checkpoint, max_new_tokens=5, device="cpu", precision="fp32")
    photo = next((shapes / "images").iterdir())
    message = [{"type": "image", "value": str(photo)}, {"type": "text", "value": "what color is it?"}]
    # the calls of its inference loop
    model.set_dump_image(lambda line: None)
    assert not model.use_custom_prompt("MMBench")
    assert not model.is_api
    assert model.generate(message=message, dataset="MMBench") == captioner.answer(
        photo, "what color is it?", max_new_tokens=5
    )
