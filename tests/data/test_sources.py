"""Every source on a small hand-written folder, and the messages for malformed ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from frozenprefix.data.samples import Sample, check_unique_ids, group_by_images
from frozenprefix.data.sources import SOURCES, load_source, load_sources, parse_source
from frozenprefix.data.sources.easy_vqa import derive_caption
from frozenprefix.data.sources.selection import in_validation
from frozenprefix.errors import ConfigError, DataError


def write_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(folder / name)


def jsonl(path: Path, *rows: object) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def captions_folder(root: Path, count: int = 4) -> Path:
    write_images(root, *(f"{number}.png" for number in range(count)))
    rows = [
        {
            "image": f"{number}.png",
            "captions": [f"first {number}", f"second {number}"],
            "split": "train" if number else "val",
        }
        for number in range(count)
    ]
    jsonl(root / "captions.jsonl", *rows)
    return root


def test_captions(tmp_path):
    samples = load_source({"type": "captions", "path": str(captions_folder(tmp_path))})
    assert samples[1] == Sample(
        id="1.png", images=(tmp_path / "1.png",), targets=("first 1", "second 1"), split="train"
    )
    assert [sample.split for sample in samples] == ["val", "train", "train", "train"]


def test_captions_of_clips(tmp_path):
    """A list of images is one sample, which shows them one after the other."""
    captions_folder(tmp_path)
    jsonl(tmp_path / "captions.jsonl", {"image": ["1.png", "2.png"], "captions": "a dog runs"})
    (sample,) = load_source({"type": "captions", "path": str(tmp_path)})
    assert sample.id == "1.png"
    assert sample.images == (tmp_path / "1.png", tmp_path / "2.png")


def test_captions_of_one_image_in_several_rows(tmp_path):
    write_images(tmp_path, "1.png")
    jsonl(tmp_path / "captions.jsonl", {"image": "1.png", "captions": "a"}, "", {"image": "1.png", "captions": "b"})
    samples = load_source({"type": "captions", "path": str(tmp_path)})
    assert [(sample.id, sample.targets) for sample in samples] == [("1.png", ("a",)), ("1.png#3", ("b",))]
    assert [len(group.samples) for group in group_by_images(samples)] == [2]


def test_split_limit_prompt_name_and_base(tmp_path):
    captions_folder(tmp_path / "data")
    common = {"type": "captions", "path": "data"}
    assert len(load_source({**common, "split": ["train", "val"]}, base=tmp_path)) == 4
    limited = load_source(
        {**common, "split": "train", "limit": 2, "prompt": "<image> Say:", "name": "x"}, base=tmp_path
    )
    assert [(sample.id, sample.prompt) for sample in limited] == [
        ("x:1.png", "<image> Say:"),
        ("x:2.png", "<image> Say:"),
    ]
    with pytest.raises(DataError, match=r"split 'vall' is not there \(did you mean 'val'\?\); splits: train, val"):
        load_source({**common, "split": "vall"}, base=tmp_path)


def test_limit_counts_images_not_samples(tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    row = {"question": "q", "answer": "x"}
    jsonl(tmp_path / "qa.jsonl", *({"image": name, **row} for name in ("a.png", "b.png", "a.png")))
    samples = load_source({"type": "qa", "path": str(tmp_path), "limit": 1})
    assert [sample.id for sample in samples] == ["a.png#1", "a.png#3"]


def test_holdout_parts_are_disjoint_by_image_and_stable(tmp_path):
    captions_folder(tmp_path, 100)
    config = {"type": "captions", "path": str(tmp_path)}
    parts = {
        part: load_source({**config, "holdout": {"fraction": 0.2, "seed": 1, "part": part}})
        for part in ("train", "val")
    }
    names = {part: {sample.id for sample in samples} for part, samples in parts.items()}
    assert not names["train"] & names["val"]
    assert len(names["train"] | names["val"]) == 100
    assert 10 <= len(names["val"]) <= 30
    assert {sample.split for sample in parts["val"]} == {"val"}
    other = load_source({**config, "holdout": {"fraction": 0.2, "seed": 2, "part": "val"}})
    assert {sample.id for sample in other} != names["val"]
    # a written-down decision: changing the rule would move images between the parts of users' data
    assert [in_validation(f"{n}.png", 0.5, 0) for n in range(6)] == [False, True, False, True, True, False]


def test_qa(tmp_path):
    write_images(tmp_path, "1.png")
    many = {"image": "1.png", "question": "what_is it?", "answers": ["a_b", "c", "c"], "type": "what", "id": 7}
    jsonl(tmp_path / "qa.jsonl", {"image": "1.png", "question": "q?", "answer": "a", "split": "train"}, many)
    config = {"type": "qa", "path": str(tmp_path)}
    first, second = load_source(config)
    assert first == Sample(
        id="1.png#1",
        images=(tmp_path / "1.png",),
        targets=("a",),
        question="q?",
        split="train",
        task="vqa",
        metadata={"answers": ("a",)},
    )
    assert (second.id, second.targets) == ("7", ("c",))
    assert second.metadata == {"answers": ("a_b", "c", "c"), "question_type": "what"}
    spaced = load_source({**config, "learn": "all", "underscores": "space"})[1]
    assert (spaced.question, spaced.targets) == ("what is it?", ("a b", "c"))
    (tmp_path / "qa.json").write_text((tmp_path / "qa.jsonl").read_text().replace("\n{", ",{").join("[]"))
    assert [sample.id for sample in load_source({**config, "file": "qa.json"})] == ["1.png#0", "7"]


def test_qa_about_several_images(tmp_path):
    write_images(tmp_path, "1.png", "2.png")
    row = {"image": ["1.png", "2.png"], "question": "which is red?", "answer": "the second"}
    jsonl(tmp_path / "qa.jsonl", row, {**row, "image": []})
    with pytest.raises(DataError, match=r"qa.jsonl:2: field 'image': got \[\], expected a text that is not empty, or"):
        load_source({"type": "qa", "path": str(tmp_path)})
    jsonl(tmp_path / "qa.jsonl", row)
    (sample,) = load_source({"type": "qa", "path": str(tmp_path)})
    assert (sample.id, sample.images) == ("1.png#1", (tmp_path / "1.png", tmp_path / "2.png"))


def vqa_folder(root: Path) -> dict[str, str]:
    write_images(root, "val2014/COCO_val2014_000000000042.jpg")
    questions = [{"question_id": 420, "image_id": 42, "question": "Is it?"}]
    (root / "q.json").write_text(json.dumps({"data_subtype": "val2014", "questions": questions}))
    annotation = {
        "question_id": 420,
        "multiple_choice_answer": "yes",
        "answer_type": "yes/no",
        "answers": [{"answer": "yes"}, {"answer": "no"}],
    }
    (root / "a.json").write_text(json.dumps({"annotations": [annotation]}))
    return {"type": "vqa_v2", "path": str(root), "questions": "q.json", "annotations": "a.json", "images": "val2014"}


def test_vqa_v2(tmp_path):
    config = vqa_folder(tmp_path)
    assert load_source(config) == [
        Sample(
            id="420",
            images=(tmp_path / "val2014/COCO_val2014_000000000042.jpg",),
            targets=("yes",),
            question="Is it?",
            split="val",
            task="vqa",
            metadata={"question_id": 420, "image_id": 42, "answers": ("yes", "no"), "answer_type": "yes/no"},
        )
    ]
    assert load_source({**config, "annotations": None})[0].targets == ()
    (tmp_path / "a.json").write_text('{"annotations": []}')
    with pytest.raises(DataError, match=r"q.json: questions\[0\]: question_id 420 has no annotation in a.json"):
        load_source(config)
    for pattern in ("x.jpg", "{image}.jpg"):
        with pytest.raises(ConfigError, match="file_pattern"):
            parse_source({**config, "file_pattern": pattern})


def test_coco(tmp_path):
    write_images(tmp_path, "val2017/1.jpg")
    images = [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}]
    annotations = [{"image_id": 1, "caption": "a dog "}, {"image_id": 1, "caption": "dogs"}]
    file = tmp_path / "captions_val2017.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    config = {"type": "coco", "path": str(tmp_path), "annotations": file.name, "images": "val2017"}
    first, second = load_source({**config, "split": "val"})
    assert (first.id, first.targets, first.images) == ("1", ("a dog", "dogs"), (tmp_path / "val2017/1.jpg",))
    assert second.targets == ()
    file.write_text(json.dumps({"images": images, "annotations": [{"image_id": 3, "caption": "a"}]}))
    with pytest.raises(DataError, match=r"annotations\[0\]: field 'image_id': got 3, expected the id of one of"):
        load_source(config)


def test_karpathy(tmp_path):
    write_images(tmp_path, *(f"val2014/{n}.jpg" for n in range(3)))
    rows = [
        {"filepath": "val2014", "filename": f"{n}.jpg", "split": split, "cocoid": n, "sentences": [{"raw": f" s{n}"}]}
        for n, split in enumerate(("train", "restval", "test"))
    ]
    (tmp_path / "d.json").write_text(json.dumps({"images": rows}))
    config = {"type": "karpathy", "path": str(tmp_path), "file": "d.json"}
    found = load_source(config)
    assert [(sample.id, sample.split, sample.targets) for sample in found] == [
        ("0.jpg", "train", ("s0",)),
        ("1.jpg", "train", ("s1",)),
        ("2.jpg", "test", ("s2",)),
    ]
    assert found[1].images == (tmp_path / "val2014/1.jpg",)
    assert [sample.split for sample in load_source({**config, "restval": "keep"})] == ["train", "restval", "test"]
    assert [sample.split for sample in load_source({**config, "restval": "drop"})] == ["train", "test"]


def test_flickr_tokens(tmp_path):
    write_images(tmp_path, "images/1.jpg", "images/2.jpg")
    (tmp_path / "Flickr8k.token.txt").write_text(
        "1.jpg#0\tA dog .\n1.jpg#1\tA cat .\n2.jpg#0\tTwo .\n3.jpg.1#0\tThree\n"
    )
    (tmp_path / "train.txt").write_text("1.jpg\n")
    (tmp_path / "val.txt").write_text("2.jpg\n")
    files = {"train": "train.txt", "val": "val.txt"}
    config = {"type": "flickr_tokens", "path": str(tmp_path), "images": "images", "split_files": files}
    samples = load_source(config)
    assert [(sample.id, sample.targets, sample.split) for sample in samples] == [
        ("1.jpg", ("A dog .", "A cat ."), "train"),
        ("2.jpg", ("Two .",), "val"),
    ]
    assert len(load_source({**config, "split_files": {}})) == 3
    (tmp_path / "val.txt").write_text("2.jpg\n1.jpg\n")
    with pytest.raises(DataError, match=r"val.txt:2: image 1.jpg is in split 'train' too"):
        load_source(config)
    (tmp_path / "Flickr8k.token.txt").write_text("1.jpg#0\tA dog .\n1.jpg A cat\n")
    with pytest.raises(DataError, match=r"Flickr8k.token.txt:2: got '1.jpg A cat', expected IMAGE.jpg#NUMBER"):
        load_source(config)


def test_image_folder(tmp_path):
    write_images(tmp_path, "train/cat/2.png", "train/cat/1.png", "test/dog/3.png")
    (tmp_path / "notes.txt").write_text("no image")
    config = {"type": "image_folder", "path": str(tmp_path)}
    assert [sample.id for sample in load_source(config)] == ["test/dog/3.png", "train/cat/1.png", "train/cat/2.png"]
    labelled = load_source({**config, "labels": True, "split_folders": True, "split": "train"})
    assert [(sample.targets, sample.metadata) for sample in labelled] == [(("cat",), {"label": "cat"})] * 2
    write_images(tmp_path, "train/4.png")
    with pytest.raises(DataError, match=r"4.png: is too high in the folder, expected .*/SPLIT/LABEL/IMAGE"):
        load_source({**config, "labels": True, "split_folders": True})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="got no image"):
        load_source({"type": "image_folder", "path": str(tmp_path / "empty")})


@pytest.mark.parametrize(
    ("questions", "caption"),
    [
        ([("what is the blue shape?", "rectangle")], "a blue rectangle"),
        ([("what color is the triangle?", "teal")], "a teal triangle"),
        ([("is there a red shape?", "yes"), ("is no circle present?", "no")], "a red circle"),
        ([("is there not a red shape?", "yes"), ("what shape is present?", "circle")], None),
        ([("is there a red shape?", "no"), ("what shape is present?", "circle")], None),
        ([], None),
    ],
)
def test_easy_vqa_caption(questions, caption):
    assert derive_caption(questions, where="x") == caption


def test_easy_vqa_contradiction():
    questions = [("what is the blue shape?", "circle"), ("what color is the shape?", "red")]
    with pytest.raises(DataError, match="image 3: its answers contradict each other: got blue, red, circle"):
        derive_caption(questions, where="image 3")


def test_easy_vqa(tmp_path, caplog):
    questions = [["what is the blue shape?", "circle", 0], ["is there a red shape?", "no", 1]]
    for folder in ("train", "test"):
        write_images(tmp_path, f"{folder}/images/0.png")
        (tmp_path / folder / "questions.json").write_text(json.dumps(questions))
    config = {"type": "easy_vqa", "path": str(tmp_path)}
    caplog.set_level("INFO")
    samples = load_source({**config, "captions": True, "split": "test"})
    assert [(sample.id, sample.task, sample.targets) for sample in samples] == [
        ("test/0#caption", "caption", ("a blue circle",)),
        ("test/0#0", "vqa", ("circle",)),
        ("test/1#0", "vqa", ("no",)),
    ]
    assert [sample.metadata.get("question_type") for sample in samples] == [None, "shape", "yes-no"]
    assert "easy_vqa test: 1 of 2 images are left out: no caption" in caplog.text
    (tmp_path / "train/questions.json").write_text('[["q", "maybe", 0]]')
    with pytest.raises(DataError, match=r"questions.json: \[0\]: got \['q', 'maybe', 0\], expected \[question"):
        load_source(config)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"image": 1.png}', r"captions.jsonl:2: not JSON"),
        ("[1]", r"captions.jsonl:2: got \[1\], expected an object"),
        ({"image": [], "captions": ["a"]}, r"field 'image': got \[\], expected a text that is not empty, or a list"),
        ({"image": "1.png"}, r"captions.jsonl:2: field 'captions' is missing; got the fields: image"),
        ({"image": "1.png", "caption": "a"}, r"field 'captions' is missing \(did you mean 'caption'\?\)"),
        ({"image": 3, "captions": []}, r"captions.jsonl:2: field 'image': got 3, expected a text that is not empty"),
        ({"image": "1.png", "captions": [1]}, r"field 'captions': got \[1\], expected a text or a list of texts"),
        ({"image": "1.png", "captions": [], "split": 1}, r"field 'split': got 1, expected a text"),
    ],
)
def test_malformed_rows_are_named(tmp_path, row, message):
    write_images(tmp_path, "0.png")
    jsonl(tmp_path / "captions.jsonl", {"image": "0.png", "captions": ["a"]}, row)
    with pytest.raises(DataError, match=message):
        load_source({"type": "captions", "path": str(tmp_path)})


def test_files_that_are_missing_or_not_text(tmp_path):
    config = {"type": "captions", "path": str(tmp_path)}
    with pytest.raises(DataError, match=r"captions.jsonl: No such file"):
        load_source(config)
    (tmp_path / "captions.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8 text"):
        load_source(config)


def test_some_missing_images_are_left_to_the_readers_but_not_all(tmp_path):
    jsonl(tmp_path / "captions.jsonl", *({"image": f"{n}.png", "captions": ["a"]} for n in range(3)))
    config = {"type": "captions", "path": str(tmp_path)}
    with pytest.raises(DataError, match=r"none of its 3 images exists, first looked for .*0.png"):
        load_source(config)
    write_images(tmp_path, "2.png")
    assert len(load_source(config)) == 3


def test_config_errors():
    assert len(SOURCES.names()) == 20
    with pytest.raises(ConfigError, match=r"unknown data source 'caption' \(did you mean 'captions'\?\)"):
        parse_source({"type": "caption"})
    with pytest.raises(ConfigError) as caught:
        parse_source({"type": "captions", "path": "x", "splt": "a", "limit": 0})
    assert len(caught.value.problems) == 2
    assert "unknown field 'splt' (did you mean 'split'?)" in str(caught.value)
    assert "field 'limit'" in str(caught.value)
    with pytest.raises(ConfigError, match="field 'type' is missing"):
        parse_source({"path": "x"})


def test_ids_are_unique_across_sources(tmp_path):
    config = {"type": "captions", "path": str(captions_folder(tmp_path))}
    with pytest.raises(
        DataError, match=r"4 ids occur more than once \('0.png' in .*captions.jsonl:1, '1.png' in .*, '2.png' in .*\)"
    ):
        load_sources([config, config])
    assert len(load_sources([config, {**config, "name": "b"}])) == 8
    check_unique_ids([])


def test_group_by_images_keeps_the_order():
    a, b = Path("a"), Path("b")
    shown = [(a,), (b,), (a,), (a, b), (b, a)]
    groups = group_by_images(Sample(id=str(n), images=images, targets=()) for n, images in enumerate(shown))
    assert [(group.images, [sample.id for sample in group.samples]) for group in groups] == [
        ((a,), ["0", "2"]),
        ((b,), ["1"]),
        ((a, b), ["3"]),
        ((b, a), ["4"]),
    ]
    assert len({sample for group in groups for sample in group.samples}) == 5


@pytest.mark.skipif("FROZENPREFIX_DATA" not in os.environ, reason="FROZENPREFIX_DATA is not set: no photo data")
def test_real_folders():
    base = Path(os.environ["FROZENPREFIX_DATA"])
    captions = load_source({"type": "captions", "path": "flickr8k"}, base=base)
    assert (len(captions), sum(len(sample.targets) for sample in captions)) == (7000, 35000)
    questions = load_source({"type": "qa", "path": "daquar"}, base=base)
    assert (len(questions), len(group_by_images(questions))) == (6795, 794)
    assert questions[2].targets == ("book, scissor, papers, tape_dispenser",)


@pytest.mark.network
def test_easy_vqa_from_its_wheel():
    config = {"type": "easy_vqa", "path": "pypi://easy-vqa==1.0/easy_vqa/data", "captions": True}
    samples = load_source(config)
    assert sum(sample.task == "vqa" for sample in samples) == 48248
    assert sum(sample.task == "caption" for sample in samples) == 4422
