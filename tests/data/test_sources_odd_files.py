"""More files as people have them: other names of the same image, hidden tar members, tables of no known name."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from frozenprefix.cli.main import app
from frozenprefix.data.samples import group_by_images
from frozenprefix.data.sources import detect_sources, load_source, load_sources, unread_tables
from frozenprefix.errors import DataError


def draw(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path, "PNG")
    return path


def bytes_of(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FROZENPREFIX_HOME", str(tmp_path / "home"))


def write_lines(folder: Path, *rows: object, name: str = "captions.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


# ── one image under several names ──


def test_links_and_roundabout_paths_are_names_of_one_image(tmp_path, caplog):
    draw(tmp_path / "images" / "a.png")
    draw(tmp_path / "images" / "b.png", "blue")
    (tmp_path / "link.png").symlink_to(tmp_path / "images" / "a.png")
    (tmp_path / "hard.png").hardlink_to(tmp_path / "images" / "a.png")
    (tmp_path / "folder").symlink_to(tmp_path / "images")
    names = (
        "images/a.png",
        "link.png",
        "hard.png",
        "./images//a.png",
        "images/../images/a.png",
        "folder/a.png",
        str(tmp_path / "images" / "a.png"),
        "images/b.png",
    )
    rows = [{"image": name, "captions": [f"caption {number}"]} for number, name in enumerate(names)]
    samples = load_source({"type": "captions", "path": write_lines(tmp_path, *rows)})
    groups = group_by_images(samples)
    assert [len(group.samples) for group in groups] == [7, 1]
    assert groups[0].images == (tmp_path / "images" / "a.png",)
    assert "4 of 6 images are joined: other name of the same file 4" in caplog.text


def test_clips_share_their_frames_under_any_name(tmp_path):
    for name in "ab":
        draw(tmp_path / f"{name}.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "a.png")
    rows = [{"image": ["a.png", "b.png"], "captions": ["x"]}, {"image": ["c.png", "b.png"], "captions": ["y"]}]
    samples = load_source({"type": "captions", "path": write_lines(tmp_path, *rows)})
    assert len(group_by_images(samples)) == 1


def test_one_image_in_two_sources(tmp_path):
    draw(tmp_path / "one" / "a.png")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    write_lines(tmp_path / "one", {"image": "a.png", "captions": ["a dog"]})
    configs = [{"type": "captions", "path": str(tmp_path / name), "name": name} for name in ("one", "two")]
    assert len(group_by_images(load_sources(configs))) == 1


def test_a_held_out_image_is_held_out_under_all_its_names(tmp_path):
    rows = []
    for number in range(40):
        draw(tmp_path / f"{number}.png")
        (tmp_path / f"link{number}.png").symlink_to(tmp_path / f"{number}.png")
        rows += [{"image": f"{place}{number}.png", "captions": ["x"]} for place in ("", "link")]
    path = write_lines(tmp_path, *rows)
    holdouts = [{"part": part, "fraction": 0.5} for part in ("train", "val")]
    train, val = (load_source({"type": "captions", "path": path, "holdout": holdout}) for holdout in holdouts)
    assert len(train) + len(val) == 80
    assert not {sample.images for sample in train} & {sample.images for sample in val}


def test_images_that_are_missing_keep_their_names(tmp_path):
    draw(tmp_path / "a.png")
    rows = [{"image": name, "captions": ["x"]} for name in ("a.png", "gone.png", "gone2.png")]
    samples = load_source({"type": "captions", "path": write_lines(tmp_path, *rows)})
    assert [sample.images[0].name for sample in samples] == ["a.png", "gone.png", "gone2.png"]


# ── null, under every name of a field ──


@pytest.mark.parametrize(
    ("name", "row", "field"),
    [
        ("qa.jsonl", {"image": "a.png", "question": "what?", "answers": None}, "answers"),
        ("qa.jsonl", {"image": "a.png", "question": "what?", "answer": None}, "answer"),
        ("qa.jsonl", {"image": "a.png", "question": None, "answer": "x"}, "question"),
        ("captions.jsonl", {"image": "a.png", "label": None}, "label"),
        ("captions.jsonl", {"image": None, "captions": ["x"]}, "image"),
    ],
)
def test_null_is_called_null_under_every_name(tmp_path, name, row, field):
    draw(tmp_path / "a.png")
    write_lines(tmp_path, row, name=name)
    with pytest.raises(DataError, match=rf"{name}:1: field '{field}': got null, expected a value"):
        load_source({"type": name.partition(".")[0], "path": str(tmp_path)})


def test_a_null_beside_a_value_gives_way(tmp_path):
    draw(tmp_path / "a.png")
    path = write_lines(tmp_path, {"image": "a.png", "label": None, "captions": ["x"]})
    assert load_source({"type": "captions", "path": path})[0].targets == ("x",)


def test_lines_that_end_in_carriage_returns_alone(tmp_path):
    draw(tmp_path / "a.png")
    row = b'{"image": "a.png", "captions": ["x"]}'
    (tmp_path / "captions.jsonl").write_bytes(row + b"\r\n" + row.replace(b"]}", b'], "id": 2}'))
    assert len(load_source({"type": "captions", "path": str(tmp_path)})) == 2
    (tmp_path / "captions.jsonl").write_bytes(row + b"\r" + row)
    with pytest.raises(DataError, match=r"captions\.jsonl:1: not JSON: the lines end in carriage returns; convert"):
        load_source({"type": "captions", "path": str(tmp_path)})


# ── tars ──


def write_tar(folder: Path, members: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder / "00000.tar"


def test_hidden_members_are_passed_over_and_counted(tmp_path, home, caplog):
    red = bytes_of("red")
    members = {"__MACOSX/._a.png": b"x", "._a.png": b"x", ".DS_Store": b"x", "a.png": red, "a.txt": b"a dog"}
    write_tar(tmp_path / "data", members)
    for _ in range(2):  # unpacked, and found unpacked
        caplog.clear()
        samples = load_sources(detect_sources(tmp_path / "data"))
        assert [(sample.id, sample.targets) for sample in samples] == [("00000/a", ("a dog",))]
        assert "4 of 5 rows are left out: hidden" in caplog.text or "3 of 4 rows are left out: hidden 3" in caplog.text


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (("v1.0/a.png", "v1.0/a.txt"), ["00000/v1.0/a"]),
        (("2020.01.02.png", "2020.01.02.txt"), ["00000/2020.01.02"]),
        (("a.png.png", "a.png.txt"), ["00000/a.png"]),
    ],
)
def test_keys_with_dots(tmp_path, home, names, ids):
    write_tar(tmp_path / "data", dict(zip(names, (bytes_of("red"), b"a dog"), strict=True)))
    assert [sample.id for sample in load_sources(detect_sources(tmp_path / "data"))] == ids


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        (700, "unexpected end of data"),
        (1100, "it is cut short behind 'a.png'"),
        (2060, "it is cut short behind 'a.txt'"),
    ],
)
def test_a_tar_cut_short(tmp_path, home, keep, reason):
    tar = write_tar(tmp_path / "data", {"a.png": bytes_of("red"), "a.txt": b"a dog", "b.png": bytes_of("blue")})
    tar.write_bytes(tar.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"00000\.tar: cannot be read as a WebDataset tar: {reason}"):
        load_sources(detect_sources(tmp_path / "data"))


@pytest.mark.parametrize("content", [b"", b"no tar" * 500])
def test_what_is_no_tar_is_one_line(tmp_path, home, content):
    (tmp_path / "00000.tar").write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_sources(detect_sources(tmp_path))
    assert "\n" not in str(caught.value)


# ── folders that hold texts under unknown names ──

CAPTIONS = [{"id": 1, "image_id": 1, "caption": "a dog"}, {"id": 2, "image_id": 2, "caption": "a cat"}]


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("captions.json", "."),
        ("dataset.json", "images"),
        ("valid/_annotations.coco.json", "valid"),
        ("annotations/coco.json", "photos"),
    ],
)
def test_coco_files_of_other_names_are_recognised(tmp_path, file, images):
    listed = [{"id": number, "file_name": f"{number}.png"} for number in (1, 2)]
    for row in listed:
        draw(tmp_path / images / row["file_name"])
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(json.dumps({"images": listed, "annotations": CAPTIONS}))
    samples = load_sources(detect_sources(tmp_path))
    assert [sample.targets for sample in samples] == [("a dog",), ("a cat",)]
    assert all(sample.images[0].is_file() for sample in samples)
    result = CliRunner().invoke(app, ["data", "check", str(tmp_path)])
    assert result.exit_code == 0
    assert "targets: 2" in result.output


@pytest.mark.parametrize(
    "name", ["instances_val2017.json", "labels.CSV", "texts.tsv", "metadata.jsonl", "deep/a.parquet"]
)
def test_tables_that_no_source_reads_are_named(tmp_path, name):
    draw(tmp_path / "a.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("[1]")
    assert unread_tables(tmp_path) == [tmp_path / name]
    result = CliRunner().invoke(app, ["data", "check", str(tmp_path)])
    assert result.exit_code == 1
    assert f"texts that may be in it are not read: {tmp_path / name}" in result.output


def test_a_folder_of_images_and_notes_is_fine(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "README.md").write_text("photos")
    assert CliRunner().invoke(app, ["data", "check", str(tmp_path)]).exit_code == 0


# ── rows that stand twice, and tables ──


def test_coco_rows_that_are_listed_twice_are_joined_and_counted(tmp_path, caplog):
    draw(tmp_path / "1.png")
    images = [{"id": 1, "file_name": "1.png"}] * 2
    annotations = [CAPTIONS[0], CAPTIONS[0], {"id": 1, "image_id": 1, "caption": "a brown dog"}]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (sample,) = load_source({"type": "coco", "path": str(tmp_path), "annotations": "c.json", "images": "."})
    assert sample.targets == ("a dog", "a brown dog")
    assert "1 of 2 images are joined: listed twice 1" in caplog.text
    assert "1 of 3 annotations are joined: listed twice 1" in caplog.text


def test_flickr_lines_of_one_number_name_both_lines(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "Flickr8k.token.txt").write_text("a.png#0\tx\na.png#1\ty\na.png#0\tz\n")
    with pytest.raises(DataError, match=r"token\.txt:3: got a\.png#0, which line 1 has too"):
        load_sources(detect_sources(tmp_path))


def table(tmp_path: Path, content: bytes, name: str = "t.tsv") -> list[tuple[str, ...]]:
    for image in "ab":
        draw(tmp_path / f"{image}.png")
    (tmp_path / name).write_bytes(content)
    config = {"type": "conceptual_captions", "path": str(tmp_path), "file": name, "images": ".", "columns": None}
    return [sample.targets for sample in load_source(config)]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_kind_of_line_end_in_tables(tmp_path, end):
    content = end.join([b"caption\timage", b'"a ""big"" dog"\ta.png', b"b\tb.png", b""])
    assert table(tmp_path, content) == [('a "big" dog',), ("b",)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.tsv", b"caption\tcaption\timage\na\tb\ta.png\n", r"t\.tsv:1: got .*, expected different names of columns"),
        ("t.csv", b"caption;image\na;a.png\n", r"expected different names of columns with ',' between them"),
        ("t.csv", "caption,image\na,a.png\n".encode("utf-16"), "not UTF-8 text .* convert the file to UTF-8"),
        ("t.tsv", b"caption\timage\na\n", "got 1 columns"),
    ],
)
def test_tables_that_would_lose_texts_are_refused(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        table(tmp_path, content, name)
