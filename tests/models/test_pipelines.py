"""A checkpoint in pipelines of transformers: one image, batches, chat messages, streams; `AutoModel` of both models."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer, pipeline

import frozenprefix  # noqa: F401 - registers the classes
from frozenprefix.errors import ConfigError
from frozenprefix.models.contrastive import LockedImageTextModel
from frozenprefix.training.setup import build_locked_model
from tests.helpers.contrastive import contrastive_recipe

TASK = "image-text-to-text"
QUESTION = "what color is this?"


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return pipeline(TASK, model=str(tiny_checkpoint))


@pytest.fixture(scope="module")
def images(shapes):
    return [Image.open(shapes / "images" / name) for name in ("red_circle.png", "blue_square.png")]


@pytest.fixture(scope="module")
def expected(tiny_checkpoint, images):
    """What `model.generate` writes about an image: prompt, number of the image -> text."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)

    def write(prompt: str, number: int = 0) -> str:
        inputs = processor(images[number], prompt, return_tensors="pt")
        return processor.tokenizer.decode(model.generate(**inputs, max_new_tokens=5)[0], skip_special_tokens=True)

    return write


def chat(image):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]


def test_one_image(pipe, images, expected):
    (result,) = pipe(images=images[0], text="<image>a", max_new_tokens=5)
    assert result["generated_text"] == "<image>a" + expected("<image>a")
    (result,) = pipe(images=images[0], text="<image>a", max_new_tokens=5, return_full_text=False)
    assert result["generated_text"] == expected("<image>a")


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_batch(pipe, images, expected, batch_size):
    prompts = ["<image>a", "<image>the dog"]
    results = pipe(
        images=[[image] for image in images],
        text=prompts,
        max_new_tokens=5,
        return_full_text=False,
        batch_size=batch_size,
    )
    assert [r["generated_text"] for r in results] == [expected(p, n) for n, p in enumerate(prompts)]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_chat_messages(pipe, images, expected, batch_size):
    prompt = f"<image>Question: {QUESTION} Answer:"
    (result,) = pipe(text=chat(images[0]), max_new_tokens=5, return_full_text=False)
    assert result["generated_text"] == expected(prompt)
    results = pipe(text=[chat(i) for i in images], max_new_tokens=5, return_full_text=False, batch_size=batch_size)
    assert [r[0]["generated_text"] for r in results] == [expected(prompt, n) for n in range(2)]


def test_a_streamer(pipe, images, expected):
    streamer = TextIteratorStreamer(pipe.tokenizer, skip_special_tokens=True)
    pipe(images=images[0], text="<image>a", generate_kwargs={"max_new_tokens": 5, "streamer": streamer})
    assert "".join(streamer) == expected("<image>a")
    with pytest.raises(ConfigError, match=r"streamer=.* a pipeline passes it to `generate` in generate_kwargs"):
        pipe(images=images[0], text="<image>a", streamer=streamer)


def test_dtype_device_and_attention(tiny_checkpoint, images):
    model = pipeline(
        TASK,
        model=str(tiny_checkpoint),
        dtype=torch.bfloat16,
        device_map="auto",
        model_kwargs={"attn_implementation": "eager"},
    )
    language_model = model.model.language_model
    assert (language_model.dtype, language_model.config._attn_implementation) == (torch.bfloat16, "eager")
    assert model.model.mapper.scale.norm.weight.dtype == torch.float32
    assert model(images=images[0], text="<image>a", max_new_tokens=2)


def test_the_locked_image_model_is_known_to_auto_classes(tmp_path, tiny_bert, shapes):
    model, processor = build_locked_model(contrastive_recipe(tiny_bert, shapes, tmp_path))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    loaded = AutoModel.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert isinstance(loaded, LockedImageTextModel)
    assert next(loaded.vision_encoder.parameters()).dtype == torch.bfloat16
    inputs = AutoProcessor.from_pretrained(tmp_path / "model").prepare_texts(["a dog"])
    assert loaded.encode_text(**inputs).shape[0] == 1
    assert LockedImageTextModel.from_pretrained(tmp_path / "model", config=loaded.config)
    with pytest.raises(ConfigError, match="attn_implementation: has no effect on this model"):
        AutoModel.from_pretrained(tmp_path / "model", attn_implementation="eager")
    with pytest.raises(ConfigError, match="load_in_8bit: has no effect on this model"):
        AutoModel.from_pretrained(tmp_path / "model", load_in_8bit=True)
