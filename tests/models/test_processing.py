"""The processor: placeholders, targets, prompts, and the round trip through a folder."""

from __future__ import annotations

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from frozenprefix.errors import ConfigError, DataError
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.models.vision.image_processing import make_image_processor
from tests.helpers.drawings import draw_shape
from tests.helpers.lm import make_tokenizer

EOS = 2


@pytest.fixture(scope="module")
def image_processor():
    return make_image_processor(
        image_size=32, resize_mode="squash", interpolation="bilinear", mean=[0.5] * 3, std=[0.5] * 3
    )


@pytest.fixture
def processor(image_processor):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return FrozenPrefixProcessor(image_processor, tokenizer, prefix_length=3)


def with_start_token(template: str = "<s> $A"):
    tokenizer = make_tokenizer()
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


def test_placeholders_lie_behind_the_vocabulary(processor):
    words = make_tokenizer().get_vocab()
    assert processor.image_token_id == len(words)
    assert processor.encode_prompt("a <image> dog") == [
        *words_of("a "), *[processor.image_token_id] * 3, *words_of(" dog")
    ]  # fmt: skip


def words_of(text: str) -> list[int]:
    return make_tokenizer()(text)["input_ids"]


def test_no_embedding_is_resized(tiny_checkpoint):
    from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration

    model = FrozenPrefixForConditionalGeneration.from_pretrained(tiny_checkpoint)
    processor = FrozenPrefixProcessor.from_pretrained(tiny_checkpoint)
    assert model.get_input_embeddings().weight.shape[0] == 300
    assert model.config.image_token_id == processor.image_token_id
    assert processor.image_token_id >= len(make_tokenizer())


def test_a_start_token_is_added_once_in_front(image_processor):
    processor = FrozenPrefixProcessor(image_processor, with_start_token(), prefix_length=2)
    image = processor.image_token_id
    assert processor.encode_prompt("<image>") == [1, image, image]
    assert processor.encode_target("<image>", "a") == [*words_of("a"), EOS], "targets have no start token"


def test_an_end_token_added_by_the_tokenizer_does_not_close_the_prompt(image_processor):
    processor = FrozenPrefixProcessor(image_processor, with_start_token("<s> $A </s>"), prefix_length=1)
    assert processor.encode_prompt("<image> a") == [1, processor.image_token_id, *words_of(" a")]
    assert processor.encode_target("<image>", "dog")[-1] == EOS


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("<image>", "dog"),
        ("<image> question", " dog"),
        ("<image> question:\n", "dog"),
        ("question <image> ", "dog"),
        ("answer", " dog"),
    ],
)
def test_a_space_between_words_and_none_behind_the_image(processor, prompt, text):
    assert processor.encode_target(prompt, "  dog ") == [*words_of(text), EOS]


def test_prompt_and_target_are_one_text(processor):
    """What is trained is how the tokenizer would have cut the whole text."""
    prompt = "what color is this answer"
    joined = processor.encode_prompt(prompt) + processor.encode_target(prompt, "red")
    assert joined == [*words_of(prompt + " red"), EOS]


def test_a_cut_target_is_still_closed(processor):
    full = processor.encode_target("<image>", "a red dog runs on the street")
    assert full[-1] == EOS
    assert processor.encode_target("<image>", "a red dog runs on the street", max_tokens=3) == [*full[:2], EOS]
    assert processor.encode_target("<image>", "a red dog runs on the street", max_tokens=len(full)) == full


@pytest.mark.parametrize("target", ["", "  ", "\n"])
def test_an_empty_target_is_an_error(processor, target):
    with pytest.raises(DataError, match="empty target after prompt '<image>'"):
        processor.encode_target("<image>", target)


def test_prompts_by_task(image_processor):
    processor = FrozenPrefixProcessor(image_processor, make_tokenizer(), prompts={"caption": "An image of"})
    assert processor.prompt_for("caption") == "<image>An image of"
    assert processor.prompt_for("vqa", "what is this?") == "<image>Question: what is this? Answer:"
    assert processor.prompt_for("vqa", "who?", template="{question} <image>") == "who? <image>"
    assert processor.prompt_for("caption", template="two: ", images=2) == "<image><image>two: "
    with pytest.raises(ConfigError, match="no prompt for task 'dialog'; known: caption, classification, vqa"):
        processor.prompt_for("dialog")
    with pytest.raises(ConfigError, match=r"prompt of task 'caption' is 'An image of', but got the question 'why\?'"):
        processor.prompt_for("caption", "why?")
    with pytest.raises(ConfigError, match="but got no question"):
        processor.prompt_for("vqa")


def test_round_trip_through_a_folder(image_processor, tmp_path):
    prompts = {"caption": "it shows", "vqa": "Q: {question} A:", "classification": "this is a"}
    processor = FrozenPrefixProcessor(image_processor, make_tokenizer(), prefix_length=5, prompts=prompts)
    processor.save_pretrained(tmp_path)
    loaded = FrozenPrefixProcessor.from_pretrained(tmp_path)
    assert (loaded.prompts, loaded.prefix_length) == (prompts, 5)
    assert loaded.image_token_id == processor.image_token_id
    image = draw_shape("red", "circle")
    before, after = (p(images=image, text="a <image> dog", return_tensors="pt") for p in (processor, loaded))
    assert before.keys() == after.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_batch_is_padded_on_the_left(processor):
    batch = processor(text=["<image>", "<image> a dog runs"], return_tensors="pt")
    length = batch["input_ids"].shape[1]
    assert batch["attention_mask"].tolist() == [[0] * (length - 3) + [1] * 3, [1] * length]
    assert batch["input_ids"][0, -3:].tolist() == [processor.image_token_id] * 3


def test_images_come_in_reading_order_and_need_a_text(processor):
    red, blue = draw_shape("red", "square"), draw_shape("blue", "square")
    batch = processor(images=[red, blue], text=["a", "<image> dog"], return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["pixel_values"][0, :, 16, 16].tolist() == [1.0, -1.0, -1.0]
    assert batch["pixel_values"][1, :, 16, 16].tolist() == [-1.0, -1.0, 1.0]
    assert ((batch["input_ids"] == processor.image_token_id).sum(1) == 3).all(), "a text without <image> gets one"
    with pytest.raises(DataError, match="text: got None with images"):
        processor(images=[red])


def test_lists_of_images_fit_their_texts(processor):
    red, blue = draw_shape("red", "square"), draw_shape("blue", "square")
    batch = processor(images=[[red, blue], [red]], text=["two", "a<image>"], return_tensors="pt")
    assert ((batch["input_ids"] == processor.image_token_id).sum(1)).tolist() == [6, 3]
    with pytest.raises(DataError, match=r"images: text 0 has 1 <image> marks and 2 images"):
        processor(images=[[red, blue], []], text=["<image>a", "<image>b"])
    with pytest.raises(DataError, match=r"images: got 2 lists for 1 texts"):
        processor(images=[[red], [blue]], text="<image>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": True}, "truncation: would cut images out of a prompt"),
        ({"max_length": 8}, "padding: 'max_length' and an argument max_length go together"),
        ({"padding": "longst"}, "padding: got 'longst', expected True, False, 'longest'"),
        (
            {"retrun_tensors": "pt"},
            r"processor: retrun_tensors='pt' has no effect here \(did you mean 'return_tensors'",
        ),
        ({"padding_side": "right"}, "processor: padding_side='right' has no effect here"),
        ({"do_resize": False}, "processor: do_resize=False has no effect here"),
    ],
)
def test_arguments_without_effect_are_refused(processor, options, message):
    with pytest.raises(ConfigError, match=message):
        processor(images=draw_shape("red", "square"), text="<image>a", **options)


def test_padding_is_that_of_transformers(processor):
    texts = ["<image>", "<image> a dog runs"]
    lengths = [len(ids) for ids in processor(text=texts, padding=False)["input_ids"]]
    assert lengths[0] < lengths[1]
    long = processor(text=texts, padding="max_length", max_length=20, return_tensors="pt")
    assert long["input_ids"].shape == (2, 20)
    assert long["attention_mask"].sum(1).tolist() == lengths
    same = processor(text=texts, truncation=False, padding=True, padding_side="left", return_tensors="pt")
    assert torch.equal(same["input_ids"], processor(text=texts, return_tensors="pt")["input_ids"])


def test_text_alone_gets_no_image(processor):
    assert processor.image_token_id not in processor(text="a dog")["input_ids"][0]


def test_decode_leaves_special_tokens_out(processor):
    ids = processor.encode_target("<image>", "a red dog")
    assert processor.decode(ids) == "a red dog"
    assert processor.batch_decode([ids, [processor.image_token_id, *ids]]) == ["a red dog", "a red dog"]
