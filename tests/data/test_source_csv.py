"""Tables as people have them: any names of columns, delimiters, encodings, names of images; Excel and JSON."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path

import pytest
from PIL import Image

from frozenprefix.data.sources import load_source
from frozenprefix.data.sources.image_names import ImageNames, photo_names
from frozenprefix.data.sources.spreadsheets import read_spreadsheet
from frozenprefix.errors import ConfigError, DataError

NAMES = ("IMG_0001.JPG", "sub/IMG_0002-2.jpg", "sub/Grün.png", "IMG_0004 (1).jpeg", "IMG_0005_edited.jpg")


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    for number, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(folder / name, "PNG" if name.endswith("png") else "JPEG")
    return folder


def read(folder: Path, file: str, content: str | bytes, **fields):
    data = content if isinstance(content, bytes) else content.encode()
    (folder / file).write_bytes(data)
    return load_source({"type": "csv", "path": str(folder), "file": file, **fields})


def told(samples) -> dict[str, tuple[str, ...]]:
    return {sample.images[0].name: sample.targets for sample in samples}


TWO = {"IMG_0001.JPG": ("ein Käfer; rot",), "Grün.png": ("eine Wiese",)}
ROWS = [["Bild", "Was man sieht"], ["IMG_0001", "ein Käfer; rot"], ["Grün.png", "eine Wiese"]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_any_delimiter_and_encoding(photos, encoding, delimiter):
    lines = [delimiter.join(f'"{cell}"' if ";" in cell else cell for cell in row) for row in ROWS]
    assert told(read(photos, "t.csv", "\r\n".join(lines).encode(encoding))) == TWO


@pytest.mark.parametrize("first", ["sep=;\r\n", '"sep=;"\n'])
def test_the_first_line_of_excel(photos, first):
    assert told(read(photos, "t.csv", first + "Bild;Text\nIMG_0001;a, b\n")) == {"IMG_0001.JPG": ("a, b",)}


def test_an_encoding_that_is_named(photos):
    assert told(read(photos, "t.csv", "f,text\nIMG_0001,Łódź\n".encode("cp1250"), encoding="cp1250")) == {
        "IMG_0001.JPG": ("Łódź",)
    }
    with pytest.raises(DataError, match=r"`encoding`: got 'cp9999', expected a name such as utf-8"):
        read(photos, "t.csv", "f,text\nIMG_0001,a\n", encoding="cp9999")


def test_excel(photos):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in [*ROWS, [None, None], [4, date(2026, 5, 1), None]]:
        book.active.append(row)
    book.create_sheet("more").append(["image", "text"])
    book["more"].append(["IMG_0005", "a tower"])
    Image.new("RGB", (8, 8)).save(photos / "4.png")
    book.save(photos / "t.xlsx")
    found = load_source({"type": "csv", "path": str(photos), "file": "t.xlsx"})
    assert told(found) == {**TWO, "4.png": ("2026-05-01T00:00:00",)}
    assert found[-1].where.endswith("t.xlsx:row 5")
    other = load_source({"type": "csv", "path": str(photos), "file": "t.xlsx", "sheet": "more"})
    assert told(other) == {"IMG_0005_edited.jpg": ("a tower",)}
    with pytest.raises(DataError, match=r"no sheet 'mor' \(did you mean 'more'\?\); sheets: Sheet, more"):
        load_source({"type": "csv", "path": str(photos), "file": "t.xlsx", "sheet": "mor"})


@pytest.mark.parametrize(
    "value",
    [
        [{"file": "IMG_0001.jpg", "texts": ["a", "b"]}, {"file": "IMG_0005", "texts": "c"}],
        {"version": 1, "items": [{"file": "IMG_0001.jpg", "texts": ["a", "b"]}, {"file": "IMG_0005", "texts": "c"}]},
        {"IMG_0001.JPG": ["a", "b"], "IMG_0005_edited.jpg": "c"},
    ],
)
def test_json(photos, value):
    wanted = {"IMG_0001.JPG": ("a", "b"), "IMG_0005_edited.jpg": ("c",)}
    assert told(read(photos, "t.json", json.dumps(value))) == wanted
    if isinstance(value, list):
        assert told(read(photos, "t.jsonl", "\n".join(map(json.dumps, value)))) == wanted


def test_several_rows_and_columns_of_captions_make_one_sample(photos):
    rows = "image,caption_1,caption_2\nIMG_0001,a,b\nimg_0001.jpg,c,\nIMG_0005,d,d\n"
    samples = read(photos, "t.csv", rows)
    assert [sample.targets for sample in samples] == [("a", "b", "c"), ("d", "d")]
    assert [sample.id for sample in samples] == ["IMG_0001#1", "IMG_0005#3"]


def test_questions_and_labels(photos):
    rows = "photo;Frage;Antwort\nIMG_0001;was?;ein Hund\nIMG_0001;wo?;\nIMG_0005;;nichts\n"
    samples = read(photos, "t.csv", rows)
    assert [(s.question, s.targets, s.task) for s in samples] == [("was?", ("ein Hund",), "vqa"), ("wo?", (), "vqa")]
    labelled = read(photos, "u.csv", "file,kind\nIMG_0001,cat\nIMG_0005,dog\nGrün,cat\nIMG_0002,cat\n")
    assert [(sample.task, sample.targets) for sample in labelled][:2] == [
        ("classification", ("cat",)),
        ("classification", ("dog",)),
    ]


def test_columns_that_are_named_and_splits(photos):
    rows = "a,b,c\nIMG_0001,one,train\nIMG_0005,two,val\n"
    fields = {"image": "a", "captions": "b", "split_column": "c"}
    assert told(read(photos, "t.csv", rows, **fields, split="val")) == {"IMG_0005_edited.jpg": ("two",)}
    with pytest.raises(DataError, match=r"`captions`: no column 'd'.*; columns: a, b, c"):
        read(photos, "t.csv", rows, image="a", captions="d")
    with pytest.raises(ConfigError, match="expected `captions`, or `question` and `answers`, or `label`"):
        read(photos, "t.csv", rows, image="a", question="b")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("IMG_0001.jpg", "IMG_0001.JPG"),
        ("img_0001", "IMG_0001.JPG"),
        ("C:\\Users\\me\\Photos\\IMG_0001.JPG", "IMG_0001.JPG"),
        ("/Users/me/sub/Gru\u0308n.png", "sub/Grün.png"),
        ("https://host/a%20b/IMG_0001.jpg?w=200", "IMG_0001.JPG"),
        ("IMG_0002.HEIC", "sub/IMG_0002-2.jpg"),
        ("IMG_0004", "IMG_0004 (1).jpeg"),
        ("IMG_0005.CR2", "IMG_0005_edited.jpg"),
        ("IMG_0003.jpg", None),
        ("", None),
    ],
)
def test_names_of_images(photos, name, found):
    assert ImageNames(photos).find(name) == (found and photos / found)


def test_a_name_that_fits_several_images_is_refused(photos):
    Image.new("RGB", (8, 8)).save(photos / "sub" / "IMG_0001.JPG")
    names = ImageNames(photos)
    assert names.find("IMG_0001.JPG") == photos / "IMG_0001.JPG", "the exact path goes before the other one"
    assert names.find("x/sub/IMG_0001.JPG") == photos / "sub" / "IMG_0001.JPG"
    (photos / "IMG_0001.JPG").rename(photos / "a.jpg")
    (photos / "more").mkdir()
    Image.new("RGB", (8, 8)).save(photos / "more" / "IMG_0001.JPG")
    with pytest.raises(
        DataError, match=r"t.csv:2: column 'image': got 'IMG_0001.JPG', which may be any of 2 images \(more/IMG_0001"
    ):
        read(photos, "t.csv", "image,text\nIMG_0001.JPG,a b\n", image="image", captions="text")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("t.csv", "image,text\nIMG_0001,a dog, a cat\n", r"t.csv:2: got 3 cells .*expected 2: image, text; .*quotes"),
        ("t.csv", "image,text\nIMG_0001\n", r"t.csv:2: got 1 cells"),
        ("t.csv", "image,text,text\nIMG_0001,a,b\n", r"t.csv:1: two columns are named 'text'"),
        ("t.csv", "", r"t.csv: got no row"),
        ("t.csv", b"PK\x03\x04...", r"is a workbook or an archive"),
        ("t.csv", b"image,text\nIMG_0001,\x81\x8d\n", r"is no text in UTF-8, UTF-16 or Windows-1252"),
        ("t.csv", "name,text\nx,a dog\ny,a cat\n", r"none of its 2 images exists, first looked for"),
        (
            "t.csv",
            "a,b\nx,hello there\n",
            r"no column names images of the folder; columns: a, b; the first cell is 'x'",
        ),
        ("t.csv", "image,n\nIMG_0001,1\nIMG_0005,2\n", r"no column holds texts besides that of the images"),
        ("t.xlsx", "no workbook", r"t.xlsx: cannot be read as an Excel table"),
        ("t.xlsx", b"\xd0\xcf\x11\xe0...", r"is encrypted, or a table of Excel 97"),
        ("t.xls", "x", r"is a table of Excel 97; save it as .xlsx or .csv"),
        ("t.json", '[{"a": 1}, 3]', r"t.json: \[1\]: got 3, expected an object"),
        ("t.json", '"a"', r"got a JSON str, expected a list of objects"),
        ("t.jsonl", '{"image": "IMG_0001", "text": "a b"}\n{"image', r"t.jsonl:2: not JSON"),
        ("t.parquet", "x", r"is no table by its name"),
    ],
)
def test_damaged_tables(photos, file, content, message):
    pytest.importorskip("openpyxl")
    with pytest.raises(DataError, match=message):
        read(photos, file, content)


def test_excel_without_openpyxl(photos, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    (photos / "t.xlsx").write_bytes(b"x")
    with pytest.raises(DataError, match=r"Excel tables need openpyxl; pip install 'frozenprefix\[excel\]'"):
        read_spreadsheet(photos / "t.xlsx")


def test_rows_that_are_left_out_are_counted(photos, caplog):
    samples = read(photos, "t.csv", "image,text\nIMG_0001,a dog\n,a cat\nIMG_0005,\nIMG_0099,a cow\n")
    assert "1 of 4 rows are left out: no image 1" in caplog.text
    assert [(sample.images[0].name, sample.targets) for sample in samples] == [
        ("IMG_0001.JPG", ("a dog",)),
        ("IMG_0005_edited.jpg", ()),
        ("IMG_0099", ("a cow",)),
    ], "blank texts and missing images are counted by those who read them"


def test_a_table_without_a_header(photos):
    assert told(read(photos, "t.csv", "IMG_0001.jpg,a dog runs\nGrün.png,a lawn there\n")) == {
        "IMG_0001.JPG": ("a dog runs",),
        "Grün.png": ("a lawn there",),
    }


# ── sidecar texts, and versions of photos ──


def test_texts_beside_images(photos, caplog):
    (photos / "IMG_0001.txt").write_bytes("ein Käfer\r\n\r\nrot\r\n".encode("cp1252"))
    (photos / "sub" / "Grün.png.txt").write_text("a lawn")
    samples = load_source({"type": "image_folder", "path": str(photos), "texts": ".txt"})
    assert {sample.id: sample.targets for sample in samples if sample.targets} == {
        "IMG_0001.JPG": ("ein Käfer", "rot"),
        "sub/Grün.png": ("a lawn",),
    }
    with pytest.raises(ConfigError, match="`labels` and `texts` are two kinds of targets"):
        load_source({"type": "image_folder", "path": str(photos), "texts": ".txt", "labels": True})


def test_versions_of_a_photo_stay_in_one_part(tmp_path):
    for number in range(60):
        for name in (f"IMG_{number:04}.jpg", f"IMG_{number:04}-2.jpg", f"IMG_{number:04} (1).jpg"):
            (tmp_path / name).write_bytes(b"")
        (tmp_path / f"IMG_E{number:04}.jpg").write_bytes(b"")

    def part(name: str, **options: object) -> set[str]:
        holdout = {"part": name, "fraction": 0.3, **options}
        return {s.id for s in load_source({"type": "image_folder", "path": str(tmp_path), "holdout": holdout})}

    def photos(names: set[str]) -> set[str]:
        return {re.search(r"\d{4}", name)[0] for name in names}

    train, val = part("train", versions="together"), part("val", versions="together")
    assert (len(train), len(val)) == (4 * len(photos(train)), 4 * len(photos(val)))
    assert photos(train).isdisjoint(photos(val))
    assert photos(train) | photos(val) == photos(train | val)
    assert photos(part("train")) & photos(part("val")), "without it they are apart"


def test_numbers_alone_do_not_make_versions():
    names = ["beach-1.jpg", "beach-2.jpg", "a.jpg", "a-1.jpg", "b_edited.jpg", "b-Edit.tif"]
    assert list(photo_names(names).values()) == ["beach-1", "beach-2", "a", "a", "b", "b"]
