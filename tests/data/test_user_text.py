"""Special tokens, lone surrogates and marks in the texts of users and data sets are text."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from frozenprefix.data.caption_retriever import RetrievalOptions
from frozenprefix.data.collation import Collator, prompt_of
from frozenprefix.data.samples import Sample, group_by_images
from frozenprefix.data.sources import load_source
from frozenprefix.errors import CheckpointError, DataError
from frozenprefix.models.processing import IMAGE_TOKEN, FrozenPrefixProcessor
from frozenprefix.models.vision.image_processing import FrozenPrefixImageProcessor
from frozenprefix.training.trainer import Trainer, train
from tests.helpers.lm import make_tokenizer

SPECIAL = ["<image>", "</s>", "<s>", "<pad>"]


@pytest.fixture(scope="module")
def processor():
    return FrozenPrefixProcessor(FrozenPrefixImageProcessor(), make_tokenizer(), prefix_length=3)


def special_ids(processor):
    return {*processor.tokenizer.all_special_ids, processor.image_token_id}


@pytest.mark.parametrize("token", SPECIAL)
def test_special_tokens_in_targets_are_text(processor, token):
    assert token in [str(added) for added in processor.tokenizer.added_tokens_decoder.values()]
    ids = processor.encode_target("", f"a {token} dog")
    assert not special_ids(processor) & set(ids[:-1])
    assert ids[-1] == processor.tokenizer.eos_token_id
    assert processor.encode_target("", "a dog") == [
        *processor.tokenizer(" a dog", add_special_tokens=False)["input_ids"],
        processor.tokenizer.eos_token_id,
    ]


@pytest.mark.parametrize("token", SPECIAL)
def test_special_tokens_in_questions_are_text_and_the_image_stays_in_front(processor, token):
    prompt = processor.prompt_for("vqa", f"what is {token} here?")
    ids = processor.encode_prompt(prompt)
    start = processor.encode_prompt("")
    assert ids[: len(start) + 3] == [*start, *[processor.image_token_id] * 3]
    assert not special_ids(processor) & set(ids[len(start) + 3 :])
    plain = processor.encode_prompt(processor.prompt_for("vqa", "what is it here?"))
    assert plain[: len(start) + 4] == ids[: len(start) + 4]  # "Question:" is read as before


@pytest.mark.parametrize("images", [1, 2])
def test_special_tokens_in_chats_are_text(processor, images):
    prompt = processor.chat_prompt([("what is <image>?", "a </s> sign")], "and <s>?", images=images + (images == 1))
    ids = processor.encode_prompt(prompt)
    assert ids.count(processor.image_token_id) == 3 * (images + (images == 1))
    assert ids.count(processor.tokenizer.eos_token_id) == 0


def test_marks_in_questions_are_images_when_there_is_one_for_each(processor):
    prompt = processor.chat_prompt([("is <image> red?", "no")], "and <image>?", images=2)
    assert prompt.count(IMAGE_TOKEN) == 2
    assert prompt.index(IMAGE_TOKEN) > prompt.index("is ")


def test_captions_of_other_images_have_no_special_tokens(processor):
    prompt = RetrievalOptions().prompt(["a </s> dog", "[pad] <image>"], "Caption:")
    ids = processor.encode_prompt(prompt)
    assert ids.count(processor.image_token_id) == 3
    assert processor.tokenizer.eos_token_id not in ids


@pytest.mark.parametrize("text", ["a \ud83d dog", "\udc00", "x\udfffy"])
def test_lone_surrogates_are_replaced(processor, text):
    assert processor.encode_target("", text)
    assert processor.encode_prompt(f"<image>{text}")


def test_lone_surrogates_in_data_are_replaced_and_counted(tmp_path, caplog):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    rows = [
        {"id": str(number), "image": "1.png", "captions": ["a \ud83d dog", "a \ud83d\ude00 cat"]} for number in (1, 2)
    ]
    rows.append({"id": "3", "image": "1.png", "captions": ["a bird"]})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = load_source({"type": "captions", "path": str(tmp_path)})
    assert samples[0].targets == ("a \ufffd dog", "a \U0001f600 cat")
    assert "2 of 3 samples are changed: lone surrogates replaced 2" in caplog.text


# ── before the first step ──


def test_a_prompt_that_cannot_be_built_is_named_with_file_and_line(processor, tmp_path):
    good = Sample("1", (tmp_path / "1.png",), ("a dog",))
    collator = Collator(processor)
    collator.check_targets(group_by_images([good]))
    cases = {
        "but got no question": Sample("7", good.images, ("red",), task="vqa", where="qa.jsonl:12"),
        "has 2 <image> marks, expected 1": Sample(
            "7", good.images, ("red",), prompt="<image><image>", where="qa.jsonl:12"
        ),
        "no prompt for task": Sample("7", good.images, ("red",), task="sing", where="qa.jsonl:12"),
    }
    for message, bad in cases.items():
        with pytest.raises(DataError, match=rf"sample '7' \(qa.jsonl:12\): .*{message}"):
            collator.check_targets(group_by_images([good, bad]))


def test_a_caption_with_an_image_mark_is_learned_as_text(tiny_recipe, tiny_lm, tmp_path):
    recipe = tiny_recipe(tmp_path, "training.max_steps=2", "training.validate_every=2")
    trainer = Trainer(recipe)
    trainer.setup()
    sample = trainer.train_groups[0].samples[0]
    target = trainer.collator.target(sample, "a <image> of a </s> dog")
    assert list(target.input_ids).count(trainer.processor.image_token_id) == recipe.model.mapper.prefix_length
    assert prompt_of(sample, trainer.processor).count(IMAGE_TOKEN) == 1


# ── resuming over other data ──


def rewrite(data, change):
    rows = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    change(rows)
    (data / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))


def other_caption(rows):
    next(row for row in rows if row.get("split") == "train")["captions"][0] = "another caption"


def one_row_less(rows):
    rows.remove(next(row for row in rows if row.get("split") == "train"))


@pytest.mark.parametrize(
    ("change", "field"), [(other_caption, r"data.train \(targets\)"), (one_row_less, r"data.train \(\w+\)")]
)
def test_a_run_is_not_resumed_over_other_data(tiny_recipe, shapes, tmp_path, change, field):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    train(tiny_recipe(tmp_path / "run", "training.max_steps=2", "training.save_every=2", data=data))
    rewrite(data, change)
    with pytest.raises(CheckpointError, match=rf"belongs to a run with other data: {field}"):
        train(tiny_recipe(tmp_path / "run", "training.max_steps=4", "training.save_every=2", data=data))


def swap_captions(data):
    def swap(rows):
        rows[0]["captions"], rows[1]["captions"] = rows[1]["captions"], rows[0]["captions"]

    rewrite(data, swap)


def swap_images(data):
    """Two images change places; names, captions and sizes of files stay what they are."""
    names = [data / "images" / f"{name}.bmp" for name in ("a", "b")]
    contents = [name.read_bytes() for name in names]
    assert len(contents[0]) == len(contents[1])
    for name, content in zip(names, reversed(contents), strict=True):
        name.write_bytes(content)


def other_order(data):
    rewrite(data, lambda rows: rows.reverse())


def other_question(data):
    (data / "qa.jsonl").write_text((data / "qa.jsonl").read_text().replace("what?", "which?"))


def broken_image(data):
    (data / "images" / "a.bmp").write_bytes(b"no image")


@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize(
    ("change", "field"),
    [
        (swap_captions, "targets"),
        (swap_images, "images"),
        (other_order, "ids"),
        (other_question, "prompts"),
        (broken_image, "ids"),
    ],
)
def test_changes_that_keep_names_and_sizes_are_noticed(tiny_recipe, tmp_path, monkeypatch, change, field, cache):
    from tests.helpers.drawings import draw_shape

    monkeypatch.setenv("FROZENPREFIX_HOME", str(tmp_path / "home"))
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for name, colour in zip("abcd", ("red", "green", "blue", "black"), strict=True):
        draw_shape(colour, "circle").save(data / "images" / f"{name}.bmp")
    rows = [{"image": f"images/{name}.bmp", "captions": [f"{name} one", f"{name} two"]} for name in "abcd"]
    (data / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    questions = [{"image": f"images/{name}.bmp", "question": "what?", "answer": name} for name in "abcd"]
    (data / "qa.jsonl").write_text("\n".join(map(json.dumps, questions)))
    sources = ", ".join(f"{{type: {kind}, path: {data}, split: null, name: {kind}}}" for kind in ("captions", "qa"))
    settings = ("training.max_steps=1", "data.validation=[]", f"data.train=[{sources}]", "data.max_bad_share=0.5")
    recipe = tiny_recipe(tmp_path / "run", *settings, f"data.feature_cache={cache}")
    train(recipe)
    train(recipe)
    change(data)
    with pytest.raises(CheckpointError, match=rf"belongs to a run with other data: data.train \({field}\)"):
        train(recipe)


# ── text towers ──


def test_special_tokens_in_captions_are_text_to_a_text_tower(tiny_bert):
    from transformers import AutoTokenizer

    from frozenprefix.models.contrastive.processing import LockedImageTextProcessor

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    processor = LockedImageTextProcessor(FrozenPrefixImageProcessor(), tokenizer)
    for token, number in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True):
        ids = processor.prepare_texts(["a dog", f"a {token} dog", "a \ud83d dog"])["input_ids"]
        if number != tokenizer.pad_token_id:
            assert len({(row == number).sum().item() for row in ids}) == 1


def test_special_tokens_in_captions_are_text_to_open_clip():
    from frozenprefix.models.contrastive.processing import OpenClipProcessor

    processor = OpenClipProcessor(FrozenPrefixImageProcessor(), open_clip_name="ViT-B-32")
    ids = processor.prepare_texts(["a dog", "a <end_of_text> dog <start_of_text>", "a \ud83d dog"])["input_ids"]
    start, end = ids[0, 0], ids[0].max()
    assert [(row == start).sum().item() for row in ids] == [1, 1, 1]
    assert [(row == end).sum().item() for row in ids] == [1, 1, 1]
