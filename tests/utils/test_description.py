"""Descriptions in images: what is written is read by Pillow, and nothing else in a file changes."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path

import pytest
from PIL import Image
from PIL.ExifTags import IFD, Base

from frozenprefix.errors import DataError
from frozenprefix.utils.caption_files import CsvWriter, MetadataWriter, TextWriter, places_in
from frozenprefix.utils.description import description_in, exif_with, with_description, xmp_with

TEXT = "Ein Käfer <rot> & groß"


def jpeg(**options) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((32, 24)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def png(**options) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((32, 24)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def camera_exif() -> bytes:
    """What a camera writes: an orientation, a date, a position and a maker note, in Motorola's order."""
    exif = Image.Exif()
    exif.endian = ">"
    exif[Base.Orientation] = 6
    exif[Base.Make] = "ACME camera"
    exif[Base.ImageDescription] = "OLYMPUS DIGITAL CAMERA"
    exif.get_ifd(IFD.Exif)[Base.MakerNote] = b"maker" * 20
    exif.get_ifd(IFD.Exif)[Base.DateTimeOriginal] = "2026:05:01 10:00:00"
    exif.get_ifd(IFD.GPSInfo)[1] = "N"
    return exif.tobytes()


def read(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize(
    "data", [jpeg(), jpeg(exif=camera_exif()), jpeg(icc_profile=b"x" * 99), png(), png(dpi=(72, 72))]
)
def test_a_description_is_written_and_written_again(data):
    once = with_description(data, "first")
    twice = with_description(once, TEXT)
    before, after = read(data), read(twice)
    assert after.tobytes() == before.tobytes()
    assert description_in(twice) == TEXT
    assert "Ein Käfer &lt;rot&gt; &amp; groß".encode() in twice
    for name in ("icc_profile", "jfif", "transparency"):
        assert after.info.get(name) == before.info.get(name)


def test_exif_of_a_camera_stays():
    before, after = (
        read(data).getexif() for data in (jpeg(exif=camera_exif()), with_description(jpeg(exif=camera_exif()), TEXT))
    )
    assert after[Base.ImageDescription].encode("latin-1").decode() == TEXT
    assert {tag: after[tag] for tag in after if tag != Base.ImageDescription} == {
        tag: before[tag] for tag in before if tag != Base.ImageDescription
    }
    for part in (IFD.Exif, IFD.GPSInfo):
        assert after.get_ifd(part) == before.get_ifd(part)


@pytest.mark.parametrize("text", ["", "a", "abc", "abcd", "a dog"])
def test_exif_of_any_length(text):
    exif = Image.Exif()
    exif.load(b"Exif\0\0" + exif_with(text))
    assert exif[Base.ImageDescription].rstrip("\0") == text
    assert list(exif) == [Base.ImageDescription]


def test_other_xmp_stays():
    packet = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="5" '
        b'xmlns:own="http://example.org/own/" own:Note="keep"/></rdf:RDF></x:xmpmeta>'
    )
    written = xmp_with(TEXT, packet)
    assert b'xmp:Rating="5"' in written
    assert re.search(rb'\w+:Note="keep"', written)
    assert description_in(written) == TEXT


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GIF89a", "is no JPEG or PNG"),
        (jpeg()[:30], "cannot be read"),
        (png()[:60], "cannot be read"),
        (b"\xff\xd8\xff\xe1" + struct.pack(">H", 12) + b"Exif\0\0II*\0" + jpeg()[2:], "cannot be read"),
    ],
)
def test_damaged_files_are_refused(data, message):
    with pytest.raises(DataError, match=message):
        with_description(data, TEXT, "a.jpg")


def test_xmp_with_entities_is_refused():
    with pytest.raises(ValueError, match="document type"):
        xmp_with("a", b'<!DOCTYPE x [<!ENTITY a "b">]><x>&a;</x>')


# ── files of captions ──


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    paths = [tmp_path / "in" / name for name in ("1.jpg", "a/2.PNG")]
    for path, data in zip(paths, (jpeg(), png()), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return paths


def write(writer, photos) -> None:
    for number, path in enumerate(photos):
        writer.write(path, f"photo {number}", -0.5)
    writer.finish()


def test_copies_leave_the_originals(photos, tmp_path):
    before = [path.read_bytes() for path in photos]
    write(MetadataWriter(photos, str(tmp_path / "out")), photos)
    assert [path.read_bytes() for path in photos] == before
    copies = [tmp_path / "out" / "1.jpg", tmp_path / "out" / "a" / "2.PNG"]
    assert [description_in(path.read_bytes()) for path in copies] == ["photo 0", "photo 1"]
    with pytest.raises(DataError, match=r"2 files are there already.*--force"):
        MetadataWriter(photos, str(tmp_path / "out"))
    MetadataWriter(photos, str(tmp_path / "out"), force=True)


def test_sidecars_and_originals(photos):
    before = [path.read_bytes() for path in photos]
    photos[0].with_suffix(".xmp").write_bytes(xmp_with("old"))
    write(MetadataWriter(photos, "sidecar"), photos)
    assert [path.read_bytes() for path in photos] == before
    assert [description_in(path.with_suffix(".xmp").read_bytes()) for path in photos] == ["photo 0", "photo 1"]
    photos[0].chmod(0o640)
    write(MetadataWriter(photos, "originals"), photos)
    assert [description_in(path.read_bytes()) for path in photos] == ["photo 0", "photo 1"]
    assert photos[0].stat().st_mode & 0o777 == 0o640
    with pytest.raises(DataError, match=r"1 images are no JPEG or PNG .*--write-metadata sidecar"):
        MetadataWriter([*photos, Path("3.heic")], "originals")


def test_texts_beside_images_are_not_replaced(photos, tmp_path):
    write(TextWriter(photos), photos)
    assert photos[1].with_suffix(".txt").read_text() == "photo 1\n"
    with pytest.raises(DataError, match="2 files are there already"):
        TextWriter(photos)
    write(TextWriter(photos, out=tmp_path / "texts"), photos)
    assert (tmp_path / "texts" / "a" / "2.txt").read_text() == "photo 1\n"
    with pytest.raises(DataError, match="would be written for two images"):
        TextWriter([Path("x/1.jpg"), Path("x/1.png")])


def test_a_table_of_another_command_is_not_replaced(photos, tmp_path):
    out = tmp_path / "c.csv"
    for _ in range(2):  # its own is replaced
        write(CsvWriter(out), photos)
        assert out.read_text("utf-8-sig").splitlines()[1:] == [f"{p},photo {n},-0.5" for n, p in enumerate(photos)]
    out.write_text("mine,too\n")
    with pytest.raises(DataError, match="was not written by this command"):
        CsvWriter(out)


def test_places_in_another_folder():
    images = [Path("a/b/1.jpg"), Path("a/c/d/2.jpg")]
    assert [path.as_posix() for path in places_in(images, Path("out")).values()] == ["out/b/1.jpg", "out/c/d/2.jpg"]
