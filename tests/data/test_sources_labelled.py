"""Labelled sources: emoji, folders named after classes, and the drawings of easy-VQA."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from frozenprefix.data.images import load_image
from frozenprefix.data.sources import load_source
from frozenprefix.data.sources.emoji import EASY_CLASSES
from frozenprefix.errors import DataError

EMOJI = [
    ("DOG FACE", "1f436.png", "Animals & Nature", "animal-mammal"),
    ("DOG", "1f415.png", "Animals & Nature", "animal-mammal"),
    ("SLICE OF PIZZA", "1f355.png", "Food & Drink", "food-prepared"),
    ("RUNNER", "1f3c3.png", "People & Body", "person-activity"),
    ("GRINNING FACE", "1f600.png", "Smileys & Emotion", "face-smiling"),
]


@pytest.fixture
def emoji(tmp_path: Path) -> Path:
    """A folder as the npm package's: the runner is replaced by another, the smiling face is not in the set."""
    drawings = tmp_path / "img" / "toy" / "64"
    drawings.mkdir(parents=True)
    rows = []
    for name, file, category, subcategory in EMOJI:
        row = {"name": name, "image": file, "category": category, "subcategory": subcategory}
        rows.append(row | ({"obsoleted_by": "1F3C3-200D"} if name == "RUNNER" else {}))
        if name != "GRINNING FACE":
            image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
            image.paste((200, 30, 30, 255), (16, 16, 48, 48))
            image.save(drawings / file)
    (tmp_path / "emoji.json").write_text(json.dumps(rows))
    return tmp_path


def test_emoji(emoji):
    samples = load_source({"type": "emoji", "path": str(emoji)})
    assert [(sample.id, sample.targets, sample.task) for sample in samples] == [
        ("1f436", ("dog",), "classification"),
        ("1f415", ("dog",), "classification"),
        ("1f355", ("pizza",), "classification"),
    ]
    assert samples[2].metadata == {
        "name": "slice of pizza", "category": "food & drink", "subcategory": "food-prepared"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        ("name", ["dog face", "dog", "slice of pizza"]),
        ("category", ["animals & nature", "animals & nature", "food & drink"]),
        ("subcategory", ["animal-mammal", "animal-mammal", "food-prepared"]),
    ],
)
def test_emoji_classes(emoji, classes, labels):
    samples = load_source({"type": "emoji", "path": str(emoji), "classes": classes})
    assert [sample.targets[0] for sample in samples] == labels


def test_transparent_ground_is_white(emoji):
    image = load_image(load_source({"type": "emoji", "path": str(emoji)})[0].images[0])
    assert (image.mode, image.getpixel((0, 0)), image.getpixel((32, 32))) == ("RGB", (255, 255, 255), (200, 30, 30))


def test_emoji_errors(emoji, tmp_path):
    config = {"type": "emoji", "path": str(emoji)}
    (emoji / "emoji.json").write_text('[{"name": "DOG"}]')
    with pytest.raises(DataError, match=r"emoji\.json: \[0\]: field 'image' is missing"):
        load_source(config)
    (emoji / "emoji.json").write_text("{}")
    with pytest.raises(DataError, match="got a JSON dict, expected a list of emoji"):
        load_source(config)
    (emoji / "img/other/64").mkdir(parents=True)
    with pytest.raises(DataError, match="got 2 folders img/SET/64, expected one"):
        load_source(config)


def test_easy_classes_share_no_emoji():
    names = [name for each in EASY_CLASSES.values() for name in each]
    assert len(names) == len(set(names))
    assert list(EASY_CLASSES) == sorted(EASY_CLASSES)


def test_folders_with_other_names(tmp_path):
    for place in ("n1/a.png", "n2/b.png"):
        (tmp_path / place).parent.mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / place)
    config = {"type": "image_folder", "path": str(tmp_path), "labels": True}
    plain = load_source(config)
    assert [(sample.targets, sample.task) for sample in plain] == [
        (("n1",), "classification"), (("n2",), "classification")
    ]  # fmt: skip
    (tmp_path / "names.json").write_text('{"n1": "dog", "n2": "cat"}')
    named = load_source({**config, "label_file": "names.json"})
    assert [(sample.targets, sample.metadata) for sample in named] == [
        (("dog",), {"label": "dog"}), (("cat",), {"label": "cat"})
    ]  # fmt: skip
    (tmp_path / "names.json").write_text('{"n1": "dog", "n3": "cat"}')
    with pytest.raises(DataError, match=r"names\.json: field 'n2' is missing; got the fields: n1, n3"):
        load_source({**config, "label_file": "names.json"})
    unlabelled = load_source({"type": "image_folder", "path": str(tmp_path)})
    assert [(sample.targets, sample.task) for sample in unlabelled] == [((), "caption")] * 2


@pytest.mark.parametrize(
    ("classes", "labels"),
    [("shape", ["circle", "triangle"]), ("color", ["red", "blue"]), ("color shape", ["red circle", "blue triangle"])],
)
def test_easy_vqa_classes(tmp_path, classes, labels):
    for part, colour, shape in (("train", "red", "circle"), ("test", "blue", "triangle")):
        (tmp_path / part / "images").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / part / "images" / "0.png")
        rows = [[f"what color is the {shape}?", colour, 0]]
        (tmp_path / part / "questions.json").write_text(json.dumps(rows))
    config = {"type": "easy_vqa", "path": str(tmp_path), "val_fraction": 0, "questions": False, "classes": classes}
    samples = load_source(config)
    assert [sample.targets[0] for sample in samples] == labels
    assert [(s.id, s.task, s.split) for s in samples] == [
        ("train/0#class", "classification", "train"), ("test/0#class", "classification", "test")
    ]  # fmt: skip
    both = load_source({**config, "captions": True, "questions": True})
    assert Counter(sample.task for sample in both) == {"classification": 2, "caption": 2, "vqa": 2}


@pytest.mark.slow
@pytest.mark.network
def test_real_emoji():
    config = {"type": "emoji", "path": "npm://emoji-datasource-twitter==16.0.0/."}
    samples = load_source(config)
    counts = Counter(sample.targets[0] for sample in samples)
    assert counts == {label: len(names) for label, names in EASY_CLASSES.items()}, "every named emoji is there"
    assert len(load_source({**config, "classes": "category"})) > 1800
    image = load_image(next(sample.images[0] for sample in samples if sample.targets == ("pizza",)))
    assert (image.size, image.getpixel((0, 0))) == ((64, 64), (255, 255, 255))
