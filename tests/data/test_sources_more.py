"""Sources of published question and caption data: each on a small hand-written folder, good and malformed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from frozenprefix.cli.main import app
from frozenprefix.data.samples import Sample
from frozenprefix.data.sources import detect_sources, load_source, load_sources, parse_source
from frozenprefix.data.sources.selection import split_in_name
from frozenprefix.errors import ConfigError, DataError


def images(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), (number, 0, 0)).save(folder / name)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("captions_train2017.json", "train"),
        ("Train_GCC-training.tsv", "train"),
        ("Validation_GCC-1.1.0-Validation.tsv", "val"),
        ("testdev_balanced_questions.json", "testdev"),
        ("qa.894.raw.test.txt", "test"),
        ("trainval.json", None),
        ("latest.json", None),
    ],
)
def test_split_in_name(name, split):
    assert split_in_name(name) == split


# ── Conceptual Captions ──


def cc_folder(root: Path) -> dict[str, str]:
    write(root / "Train_GCC-training.tsv", "a dog\thttp://x/0.jpg\na cat \thttp://x/1.jpg\ntwo\thttp://x/2.jpg\n")
    images(root, "images/00000/000000002.png", "images/0.jpg")
    return {"type": "conceptual_captions", "path": str(root), "file": "Train_GCC-training.tsv"}


def test_conceptual_captions_by_number(tmp_path, caplog):
    config = cc_folder(tmp_path)
    assert load_source({**config, "split": "train"}) == [
        Sample("0", (tmp_path / "images/0.jpg",), ("a dog",), split="train", metadata={"url": "http://x/0.jpg"}),
        Sample(
            "2",
            (tmp_path / "images/00000/000000002.png",),
            ("two",),
            split="train",
            metadata={"url": "http://x/2.jpg"},
        ),
    ]
    assert "Train_GCC-training.tsv: 1 of 3 rows are left out: not downloaded 1" in caplog.text
    kept = load_source({**config, "keep_missing": True})
    assert [(sample.id, sample.targets) for sample in kept] == [("0", ("a dog",)), ("1", ("a cat",)), ("2", ("two",))]
    images(tmp_path, "images/2.jpg")
    with pytest.raises(DataError, match=r"images/2.jpg: is image 2, as .*000000002.png is, expected one file"):
        load_source(config)
    with pytest.raises(DataError, match=r"all of its 3 rows are left out \(not downloaded 3\)"):
        load_source({**config, "images": "elsewhere"})


def test_conceptual_captions_by_path_and_header(tmp_path, caplog):
    images(tmp_path, "a/x.jpg")
    write(tmp_path / "t.tsv", "url\tcaption\timage\tscore\nhttp://x\tdog\ta/x.jpg\t1\nhttp://y\tcat\t\t2\n")
    config = {"type": "conceptual_captions", "path": str(tmp_path), "file": "t.tsv", "images": ".", "columns": None}
    (sample,) = load_source(config)
    assert (sample.id, sample.images, sample.targets) == ("0", (tmp_path / "a/x.jpg",), ("dog",))
    assert "1 of 2 rows are left out: column 'image' is empty 1" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\thttp://x\nb", r"t.tsv:2: got 1 columns in 'b', expected 2: caption, url"),
        ("caption\turl\na\thttp://x", r"t.tsv:1: column 'url': got 'url', expected an address; name the columns in"),
        ("a\thttp://x\n \thttp://y", r"t.tsv:2: column 'caption' is empty, expected a text"),
    ],
)
def test_conceptual_captions_malformed(tmp_path, text, message):
    write(tmp_path / "t.tsv", text)
    images(tmp_path, "images/0.jpg")
    with pytest.raises(DataError, match=message):
        load_source({"type": "conceptual_captions", "path": str(tmp_path), "file": "t.tsv"})
    with pytest.raises(ConfigError, match="expected a column 'caption'"):
        parse_source({"type": "conceptual_captions", "path": "x", "file": "t.tsv", "columns": ["url"]})


# ── questions ──


def test_ok_vqa_has_no_chosen_answer(tmp_path):
    images(tmp_path, "val2014/COCO_val2014_000000000042.jpg")
    write(
        tmp_path / "q.json",
        {"data_subtype": "val2014", "questions": [{"question_id": 1, "image_id": 42, "question": "q"}]},
    )
    answers = [{"answer_id": n, "answer": text, "raw_answer": "x"} for n, text in enumerate(["pony", "race", "race"])]
    write(tmp_path / "a.json", {"annotations": [{"question_id": 1, "question_type": "four", "answers": answers}]})
    config = {"type": "vqa_v2", "path": str(tmp_path), "questions": "q.json", "annotations": "a.json"}
    (sample,) = load_source({**config, "images": "val2014"})
    assert (sample.targets, sample.metadata["answers"]) == (("race",), ("pony", "race", "race"))


def test_vizwiz(tmp_path):
    images(tmp_path, "val/VizWiz_val_00000000.jpg", "test/VizWiz_test_00000000.jpg")
    answers = [{"answer": "basil", "answer_confidence": "yes"}, {"answer": "leaf"}, {"answer": "leaf"}]
    row = {"image": "VizWiz_val_00000000.jpg", "question": "what?", "answers": answers, "answerable": 1}
    write(tmp_path / "Annotations/val.json", [{**row, "answer_type": "other"}])
    write(tmp_path / "Annotations/test.json", [{"image": "VizWiz_test_00000000.jpg", "question": "who?"}])
    config = {"type": "vizwiz", "path": str(tmp_path)}
    assert detect_sources(tmp_path) == [{**config, "name": None}]
    test, val = load_source(config)
    assert val == Sample(
        id="VizWiz_val_00000000.jpg",
        images=(tmp_path / "val/VizWiz_val_00000000.jpg",),
        targets=("leaf",),
        question="what?",
        split="val",
        task="vqa",
        metadata={"answers": ("basil", "leaf", "leaf"), "answer_type": "other", "answerable": True},
    )
    assert (test.split, test.targets, test.metadata) == ("test", (), {})
    # only the wanted split's file is read
    write(tmp_path / "Annotations/test.json", "no JSON")
    assert load_source({**config, "split": "val"}) == [val]
    with pytest.raises(DataError, match=r"split 'vall' is not there \(did you mean 'val'\?\); splits: test, val"):
        load_source({**config, "split": "vall"})
    write(tmp_path / "Annotations/test.json", {"image": "x"})
    with pytest.raises(DataError, match=r"test.json: got a JSON dict, expected a list of objects"):
        load_source(config)
    write(tmp_path / "Annotations/test.json", [{"image": "x", "question": "q", "answers": [{"answr": "a"}]}])
    with pytest.raises(DataError, match=r"test.json: \[0\].answers\[0\]: field 'answer' is missing"):
        load_source(config)


def test_gqa(tmp_path):
    images(tmp_path, "images/n1.jpg")
    row = {"imageId": "n1", "question": "Is it dark?", "answer": "yes", "fullAnswer": "Yes, it is."}
    write(tmp_path / "val_balanced_questions.json", {"07": {**row, "types": {"structural": "verify"}}})
    config = {"type": "gqa", "path": str(tmp_path)}
    assert detect_sources(tmp_path) == [{**config, "name": None}]
    assert load_source(config) == [
        Sample(
            id="07",
            images=(tmp_path / "images/n1.jpg",),
            targets=("yes",),
            question="Is it dark?",
            split="val",
            task="vqa",
            metadata={
                "image_id": "n1",
                "question_type": "verify",
                "full_answer": "Yes, it is.",
                "answers": ("yes",),
            },
        )
    ]
    write(tmp_path / "val_balanced_questions.json", {"07": {**row, "types": {"semantic": "attr"}}})
    with pytest.raises(DataError, match=r"questions.json: 07.types: field 'structural' is missing"):
        load_source(config)
    write(tmp_path / "val_balanced_questions.json", {"07": "what?"})
    with pytest.raises(DataError, match=r"questions.json: 07: got 'what\?', expected an object"):
        load_source(config)
    with pytest.raises(DataError, match=r"has no file 'train_\*.json'; check `path`"):
        load_source({**config, "questions": "train_*.json"})


def clevr_folder(root: Path) -> Path:
    for split in ("train", "test"):
        images(root, f"images/{split}/CLEVR_{split}_000000.png")
        row = {"image_filename": f"CLEVR_{split}_000000.png", "split": split, "question_index": 3, "question": "How?"}
        if split == "train":
            row.update(answer="2", program=[{"function": "scene"}, {"function": "count"}])
        write(root / f"questions/CLEVR_{split}_questions.json", {"info": {}, "questions": [row]})
    return root


def test_clevr(tmp_path):
    config = {"type": "clevr", "path": str(clevr_folder(tmp_path))}
    test, train = load_source(config)
    assert train == Sample(
        id="train/3",
        images=(tmp_path / "images/train/CLEVR_train_000000.png",),
        targets=("2",),
        question="How?",
        split="train",
        task="vqa",
        metadata={"answers": ("2",), "question_type": "count"},
    )
    assert (test.id, test.targets, test.metadata) == ("test/3", (), {})
    write(tmp_path / "questions/CLEVR_test_questions.json", {"questions": [{"split": "test"}]})
    with pytest.raises(DataError, match=r"test_questions.json: questions\[0\]: field 'question_index' is missing"):
        load_source(config)


def genome_folder(root: Path) -> Path:
    images(root, "VG_100K/1.jpg", "VG_100K_2/2.jpg")
    regions = [{"id": n, "regions": [{"phrase": "a clock "}, {"phrase": "shade"}]} for n in (1, 2, 3)]
    write(root / "region_descriptions.json", regions)
    qas = [{"qa_id": 9, "image_id": 2, "question": "What?", "answer": "A clock."}]
    write(root / "question_answers.json", [{"id": 2, "qas": qas}])
    return root


def test_visual_genome(tmp_path):
    config = {"type": "visual_genome", "path": str(genome_folder(tmp_path))}
    samples = load_source(config)
    assert [sample.id for sample in samples] == ["regions/1", "regions/2", "regions/3", "qa/9"]
    places = [sample.images[0].relative_to(tmp_path).as_posix() for sample in samples]
    assert places == ["VG_100K/1.jpg", "VG_100K_2/2.jpg", "VG_100K/3.jpg", "VG_100K_2/2.jpg"]
    assert samples[0].targets == ("a clock", "shade")
    assert (samples[3].task, samples[3].targets, samples[3].question) == ("vqa", ("A clock.",), "What?")
    assert len(load_source({**config, "questions": None})) == 3
    with pytest.raises(ConfigError, match="got null for both"):
        parse_source({**config, "questions": None, "regions": None})
    write(tmp_path / "question_answers.json", [{"id": 2, "qas": [{"qa_id": 9, "question": "What?"}]}])
    with pytest.raises(DataError, match=r"question_answers.json: \[0\].qas\[0\]: field 'answer' is missing"):
        load_source(config)


def test_daquar(tmp_path):
    images(tmp_path, "nyu_depth_images/image3.png")
    lines = "what is on the desk in the image3 ?\nbook, tape_dispenser\nwhat is left of the image3 ?\nbox\n\n"
    write(tmp_path / "qa.894.raw.train.txt", lines)
    config = {"type": "daquar", "path": str(tmp_path)}
    assert detect_sources(tmp_path) == [{**config, "name": None}]
    first, second = load_source({**config, "split": "train"})
    assert first == Sample(
        id="qa.894.raw.train.txt:1",
        images=(tmp_path / "nyu_depth_images/image3.png",),
        targets=("book, tape_dispenser",),
        question="what is on the desk ?",
        split="train",
        task="vqa",
        metadata={"answers": ("book, tape_dispenser",)},
    )
    assert second.question == "what is left of the image3 ?"
    assert load_source({**config, "underscores": "space"})[0].targets == ("book, tape dispenser",)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("in image3 ?\na\nin image3 ?", r"qa.894.raw.test.txt:3: got 'in image3 \?' last, expected an answer after it"),
        ("what ?\na", r"test.txt:1: got 'what \?', expected a question that names its image"),
        ("in image3 ?\n\nin image3 ?\nb", r"test.txt:2: got an empty line, expected the answer to 'in image3 \?'"),
    ],
)
def test_daquar_malformed(tmp_path, lines, message):
    write(tmp_path / "qa.894.raw.test.txt", lines)
    with pytest.raises(DataError, match=message):
        load_source({"type": "daquar", "path": str(tmp_path)})


# ── what a folder is, and its check ──


def test_detected_folders(tmp_path):
    samples = load_sources(detect_sources(genome_folder(tmp_path)))
    assert [sample.id for sample in samples] == ["regions/1", "regions/2", "regions/3", "qa/9"]
    (tmp_path / "region_descriptions.json").unlink()
    assert [sample.id for sample in load_sources(detect_sources(tmp_path))] == ["qa/9"]
    write(tmp_path / "captions.jsonl", {"image": "VG_100K/1.jpg", "captions": ["a"]})
    (tmp_path / "images.tar").write_bytes(b"an archive beside the data")
    assert [sample.id for sample in load_sources(detect_sources(tmp_path))] == [
        "captions:VG_100K/1.jpg",
        "visual_genome:qa/9",
    ]


def test_data_check_of_clevr(tmp_path):
    result = CliRunner().invoke(app, ["data", "check", str(clevr_folder(tmp_path))])
    assert "samples by split: test 1, train 1" in result.output
    # both images are the same
    assert "same bytes across splits: 1" in result.output
    assert result.exit_code == 1
