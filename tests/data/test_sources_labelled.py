"""Labelled sources: folders named after classes, and the drawings of easy-VQA."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from PIL import Image

from frozenprefix.data.sources import load_source
from frozenprefix.errors import DataError


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
