"""Files as people have them: quoted tables, repeated rows, byte order marks, names with dots."""

from __future__ import annotations

import csv
import io
import json
import tarfile

import pytest
from PIL import Image

from frozenprefix.data.samples import Sample, digest_samples, with_targets
from frozenprefix.data.sources import detect_sources, load_source, load_sources
from frozenprefix.errors import DataError


def draw(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, "PNG")


# ── rows that share an id ──


def coco(tmp_path, images, annotations):
    (tmp_path / "annotations").mkdir(exist_ok=True)
    for row in images:
        draw(tmp_path / "val2017" / row["file_name"])
    content = {"images": images, "annotations": annotations}
    (tmp_path / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    return {
        "type": "coco",
        "path": str(tmp_path),
        "annotations": "annotations/captions_val2017.json",
        "images": "val2017",
    }


CAPTIONS = [{"image_id": 1, "caption": "a dog"}, {"image_id": 1, "caption": "a cat"}]


def test_two_coco_images_of_one_id_are_an_error_that_names_both(tmp_path):
    config = coco(tmp_path, [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}], CAPTIONS)
    with pytest.raises(DataError, match=r"images\[1\]: field 'id': got 1 for b.jpg, .* a.jpg in .*images\[0\] too"):
        load_source(config)


def test_a_coco_image_that_is_listed_twice_is_one_image(tmp_path):
    samples = load_source(coco(tmp_path, [{"id": 1, "file_name": "a.jpg"}] * 2, CAPTIONS))
    assert [(sample.id, sample.targets) for sample in samples] == [("1", ("a dog", "a cat"))]


def test_two_annotations_of_one_question_are_an_error_that_names_both(tmp_path):
    draw(tmp_path / "val2014" / "COCO_val2014_000000000001.jpg")
    question = {"question_id": 7, "image_id": 1, "question": "what?"}
    annotation = {"question_id": 7, "answers": [{"answer": "dog"}]}
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "val2014", "questions": [question]}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": [annotation, annotation]}))
    config = {
        "type": "vqa_v2",
        "path": str(tmp_path),
        "questions": "q.json",
        "annotations": "a.json",
        "images": "val2014",
    }
    with pytest.raises(DataError, match=r"annotations\[1\]: field 'question_id': got 7, .* annotations\[0\] too"):
        load_source(config)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "gqa_balanced_questions.json",
            '{"1": {"imageId": "1", "question": "a?"}, "1": {"imageId": "2", "question": "b?"}}',
        ),
        ("captions.jsonl", '{"image": "images/1.jpg", "captions": ["a"], "captions": ["b"]}'),
    ],
)
def test_a_json_field_that_stands_twice_is_an_error(tmp_path, name, text):
    draw(tmp_path / "images" / "1.jpg")
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="occurs twice"):
        load_source({"type": name.split("_")[0].removesuffix(".jsonl"), "path": str(tmp_path)})


def test_repeated_ids_name_both_lines(tmp_path):
    draw(tmp_path / "1.jpg")
    rows = [{"id": 5, "image": "1.jpg", "captions": ["a"]}] * 2
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"'5' in .*captions.jsonl:1 and .*captions.jsonl:2"):
        load_source({"type": "captions", "path": str(tmp_path)})


def test_two_different_genome_images_of_one_name_are_an_error(tmp_path):
    draw(tmp_path / "VG_100K" / "1.jpg")
    (tmp_path / "VG_100K_2").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "VG_100K_2" / "1.jpg")
    (tmp_path / "region_descriptions.json").write_text(json.dumps([{"id": 1, "regions": [{"phrase": "a"}]}]))
    config = {"type": "visual_genome", "path": str(tmp_path), "questions": None}
    with pytest.raises(DataError, match=r"VG_100K_2/1.jpg: got another image than .*VG_100K/1.jpg"):
        load_source(config)


# ── tables ──

HARD = ['a man says "hello" to a dog', 'a sign, "stop", in red', '"quoted"', "plain", "tab\there", "two\nlines"]


@pytest.mark.parametrize(("ending", "delimiter"), [("tsv", "\t"), ("csv", ",")])
def test_tables_written_with_quotes_come_back(tmp_path, ending, delimiter):
    with (tmp_path / f"t.{ending}").open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([["caption", "image"], *([text, "1.jpg"] for text in HARD)])
    draw(tmp_path / "images" / "1.jpg")
    config = {"type": "conceptual_captions", "path": str(tmp_path), "file": f"t.{ending}", "columns": None}
    samples = load_source(config)
    assert [sample.targets[0] for sample in samples] == HARD
    assert samples[-1].where.endswith(f"t.{ending}:7")


def test_tables_written_without_quoting_are_taken_as_they_are(tmp_path):
    (tmp_path / "t.tsv").write_text('"big" dog\thttp://x/1\nan "odd" cat\thttp://x/2\n"open\thttp://x/3\n')
    for number in range(3):
        draw(tmp_path / "images" / f"{number}.jpg")
    samples = load_source({"type": "conceptual_captions", "path": str(tmp_path), "file": "t.tsv"})
    assert [sample.targets[0] for sample in samples] == ['"big" dog', 'an "odd" cat', '"open']


KAGGLE = 'image,caption\n1.jpg,"A man , with ""x"" ."\n1.jpg,a dog\n2.jpg,two cats\n'
RESULTS = 'image_name| comment_number| comment\n1.jpg| 0| A man , " x " .\n1.jpg| 1   a dog\n2.jpg| 0| two cats\n'


@pytest.mark.parametrize(
    ("name", "text", "first"),
    [("captions.txt", KAGGLE, 'A man , with "x" .'), ("results.csv", RESULTS, 'A man , " x " .')],
)
def test_flickr_tables_of_kaggle(tmp_path, name, text, first):
    (tmp_path / name).write_text(text)
    for image in ("1.jpg", "2.jpg"):
        draw(tmp_path / "Images" / image)
    (config,) = detect_sources(tmp_path)
    assert (config["type"], config["tokens"], config["images"]) == ("flickr_tokens", name, "Images")
    samples = load_source(config)
    assert [(sample.id, sample.targets) for sample in samples] == [
        ("1.jpg", (first, "a dog")),
        ("2.jpg", ("two cats",)),
    ]


def test_a_flickr_table_with_an_unquoted_comma_names_its_line(tmp_path):
    (tmp_path / "captions.txt").write_text("image,caption\n1.jpg,a dog, a cat\n")
    with pytest.raises(DataError, match=r"captions.txt:2: got 3 cells .*expected 2"):
        load_source({"type": "flickr_tokens", "path": str(tmp_path), "tokens": "captions.txt", "images": "."})


# ── smaller ones ──


def test_null_is_called_null(tmp_path):
    (tmp_path / "captions.jsonl").write_text('{"image": "1.jpg", "captions": null}')
    with pytest.raises(DataError, match=r"captions.jsonl:1: field 'captions': got null"):
        load_source({"type": "captions", "path": str(tmp_path)})


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FROZENPREFIX_HOME", str(tmp_path / "home"))


def test_tar_members_with_dots_and_a_byte_order_mark(tmp_path, home):
    members = {}
    for name, text in (("img.2020.1", b"\xef\xbb\xbfa dog"), ("img.2020.2", b"a cat")):
        members |= {f"{name}.png": png(), f"{name}.txt": text}
    tar(tmp_path / "0.tar", members)
    samples = load_source({"type": "webdataset", "path": str(tmp_path)})
    assert [(sample.id, sample.targets[0]) for sample in samples] == [
        ("0/img.2020.1", "a dog"),
        ("0/img.2020.2", "a cat"),
    ]


def test_a_tar_with_a_mask_beside_each_image_keeps_its_keys(tmp_path, home):
    tar(tmp_path / "0.tar", {"a.png": png(), "a.seg.png": png(), "a.txt": b"a dog"})
    samples = load_source({"type": "webdataset", "path": str(tmp_path), "image": "png"})
    assert [(sample.id, sample.targets) for sample in samples] == [("0/a", ("a dog",))]


def test_coco_folders_are_recognised(tmp_path):
    coco(tmp_path, [{"id": 1, "file_name": "a.jpg"}], CAPTIONS)
    draw(tmp_path / "train2017" / "b.jpg")
    train = {"images": [{"id": 2, "file_name": "b.jpg"}], "annotations": [{"image_id": 2, "caption": "a bird"}]}
    (tmp_path / "annotations" / "captions_train2017.json").write_text(json.dumps(train))
    samples = load_sources(detect_sources(tmp_path))
    assert {(sample.id, sample.split) for sample in samples} == {("1", "val"), ("2", "train")}
    assert [sample.id for sample in load_sources(detect_sources(tmp_path, "val"))] == ["1"]


def test_karpathy_and_vqa_folders_are_recognised(tmp_path):
    draw(tmp_path / "images" / "a.jpg")
    row = {"filename": "a.jpg", "split": "test", "imgid": 0, "sentences": [{"raw": "a dog"}]}
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": [row]}))
    (karpathy,) = detect_sources(tmp_path)
    assert (karpathy["type"], karpathy["images"]) == ("karpathy", "images")
    assert load_source(karpathy)[0].targets == ("a dog",)


# ── samples without a target, and what a run depends on ──


def test_one_rule_for_samples_without_a_target(caplog):
    samples = [Sample("1", (), ("a", "")), Sample("2", (), ()), Sample("3", (), (" ",))]
    assert [(sample.id, sample.targets) for sample in with_targets(samples, where="data.val")] == [("1", ("a",))]
    assert "data.val: 2 of 3 samples are left out: no target 2" in caplog.text
    assert "data.val: 1 of 2 targets are left out: blank 1" in caplog.text
    with pytest.raises(DataError, match=r"data.val: all of its 1 samples are left out"):
        with_targets(samples[1:2], where="data.val")


def test_the_digest_tells_what_differs():
    from dataclasses import replace
    from pathlib import Path

    sample = Sample("1", (Path("1.jpg"),), ("a dog",), prompt="Say:")
    before = digest_samples([sample])
    changes = {
        "ids": replace(sample, id="2"),
        "targets": replace(sample, targets=("a cat",)),
        "images": replace(sample, images=(Path("2.jpg"),)),
        "prompts": replace(sample, question="what?"),
    }
    for field, changed in changes.items():
        after = digest_samples([changed])
        assert [name for name in before if before[name] != after[name]] == [field]
    assert digest_samples([sample, replace(sample, id="2")])["number"] == 2
    assert digest_samples([replace(sample, where="elsewhere:3")]) == before


# ── files that are not what their names say ──


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train-00000-of-00001.parquet", b"no parquet"),
        ("dataset_dict.json", b"{}"),
        ("state.json", b"[]"),
        ("0001.tar", b"\0\1" * 2000),
        ("captions.jsonl", b"\xff\xfe"),
        ("captions.jsonl", b"[" * 5000),
        ("qa.json", b'{"a":'),
        ("captions.txt", b"image,caption\n"),
        ("results.csv", b"image_name| comment_number| comment\n1.jpg\n"),
        ("annotations/captions_val2017.json", b'{"images": 3}'),
        ("dataset_coco.json", b'{"images": [{}]}'),
    ],
)  # fmt: skip
def test_damaged_files_are_data_errors_and_not_tracebacks(tmp_path, home, name, content):
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(DataError):
        load_sources(detect_sources(tmp_path / "data"))


def test_names_that_are_not_utf_8_are_shown_and_counted(tmp_path):
    from typer.testing import CliRunner

    from frozenprefix.cli.main import app

    draw(tmp_path / "1.jpg")
    rows = [{"image": "a\udce9.jpg", "captions": ["x"]}, {"image": "1.jpg", "captions": ["y"]}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "report.json"
    outcome = CliRunner().invoke(app, ["data", "check", str(tmp_path), "--out", str(out)])
    assert outcome.exit_code == 1
    assert isinstance(outcome.exception, SystemExit)
    assert json.loads(out.read_text())["bad_images"] == {"missing": 1}
