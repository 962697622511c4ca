"""Images of every mode, and files that are none."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image, features

from frozenprefix.data.images import BadImages, decode_image, load_image
from frozenprefix.errors import BadImageError, DataError

AVIF = features.check("avif")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def reason(data: bytes) -> str:
    with pytest.raises(BadImageError) as caught:
        decode_image(data, "x.jpg")
    assert "x.jpg" in str(caught.value)
    return caught.value.reason


def test_rgb_is_unchanged(tmp_path):
    noise().save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), np.asarray(noise()))


def test_missing_and_empty(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name, expected in (("none.jpg", "missing"), ("empty.jpg", "empty"), (".", "unreadable")):
        with pytest.raises(BadImageError) as caught:
            load_image(tmp_path / name)
        assert caught.value.reason == expected


def test_not_an_image():
    assert reason(b"<html>not found</html>") == "not_an_image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_every_cut_of_a_file_is_a_bad_image(kind):
    data = encoded(noise(), kind)
    assert reason(data[: len(data) // 2]) in ("truncated", "not_an_image")
    for length in range(1, len(data) - 64, max(1, len(data) // 23)):
        assert reason(data[:length]) in ("truncated", "not_an_image", "unsupported")


def test_half_a_jpeg_is_truncated():
    data = encoded(noise(), "JPEG")
    assert reason(data[: len(data) // 2]) == "truncated"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "GIF", "TIFF", pytest.param("AVIF", marks=pytest.mark.skipif(not AVIF, reason="no AVIF"))]
)
def test_overwritten_bytes_give_a_image_or_a_bad_image(kind):
    rng = np.random.default_rng(1)
    data = encoded(noise(size=(24, 24)), kind)
    for _ in range(60):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), 6):
            broken[place] = rng.integers(0, 256)
        # any other exception fails the test
        with contextlib.suppress(BadImageError):
            assert decode_image(bytes(broken), "x").mode == "RGB"


def test_too_large(monkeypatch):
    monkeypatch.setattr("frozenprefix.utils.images.MAX_PIXELS", 64 * 48 - 1)
    assert reason(encoded(noise(), "PNG")) == "too_large"


def test_decompression_bomb_is_too_large(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert reason(encoded(noise(), "PNG")) == "too_large"


def test_drawing_formats_are_not_rendered():
    assert reason(encoded(noise(), "EPS")) == "unsupported"


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_is_scaled_not_clipped(kind):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    grey = np.asarray(decode_image(encoded(Image.fromarray(values), kind), "x"))
    assert grey.shape == (1, 4, 3)
    assert grey[0, :, 0].tolist() == [0, 1, 128, 255]


def test_float_and_32_bit_are_stretched():
    for values in (np.array([[-1.0, 0.0, 1.0]], np.float32), np.array([[0, 500_000, 1_000_000]], np.int32)):
        grey = np.asarray(decode_image(encoded(Image.fromarray(values), "TIFF"), "x"))
        assert grey[0, :, 0].tolist() == [0, 128, 255]
    constant = np.asarray(decode_image(encoded(Image.fromarray(np.full((1, 2), 7.0, np.float32)), "TIFF"), "x"))
    assert constant.max() == 0
    assert reason(encoded(Image.fromarray(np.array([[np.nan, 1]], np.float32)), "TIFF")) == "unsupported"


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_becomes_white(mode):
    transparent = Image.new(mode, (2, 1), (0,) * len(mode))
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128)).convert(mode)
    transparent.paste(half, (1, 0))
    pixels = np.asarray(decode_image(encoded(transparent, "PNG"), "x"))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1].tolist() == [127, 127, 127]


def test_palette_with_and_without_transparency():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert np.asarray(decode_image(encoded(palette, "PNG"), "x")).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    seen = np.asarray(decode_image(encoded(palette, "PNG", transparency=1), "x"))
    assert seen.tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_one_bit_grey_and_cmyk():
    bits = Image.fromarray(np.array([[True, False]]))
    assert np.asarray(decode_image(encoded(bits, "PNG"), "x")).tolist() == [[[255] * 3, [0] * 3]]
    grey = Image.new("L", (1, 1), 77)
    assert np.asarray(decode_image(encoded(grey, "PNG"), "x")).tolist() == [[[77] * 3]]
    cyan = np.asarray(decode_image(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG"), "x"))[4, 4]
    assert cyan[0] < 10
    assert cyan[1] > 245
    assert cyan[2] > 245


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    upright = Image.new("RGB", (32, 16), "blue")
    upright.paste("red", (0, 0, 8, 8))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the inverse of how a viewer turns it
    turned = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = decode_image(encoded(turned, "PNG", exif=exif), "x")
    assert shown.size == (32, 16)
    assert np.array_equal(np.asarray(shown), np.asarray(upright))


def test_animation_gives_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert decode_image(data, "x").getpixel((0, 0)) == (255, 0, 0)


def test_bad_images_are_counted_once_and_listed(tmp_path):
    bad = BadImages()
    for name, why in (("a", "missing"), ("a", "missing"), ("b", "missing"), ("c", "truncated")):
        bad.record(name, BadImageError(why, f"{name}: {why}"))
    assert len(bad) == 3
    assert bad.counts == {"missing": 2, "truncated": 1}
    assert "b" in bad
    bad.write(tmp_path / "bad.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert rows[2] == {"image": "c", "reason": "truncated", "message": "c: truncated"}


def test_bad_images_past_the_limit_stop_the_run(tmp_path):
    bad = BadImages()
    bad.record("a", BadImageError("missing", "a: No such file"))
    bad.check(100)
    bad.check(1, max_share=1.0)
    bad.write(tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match=r"1 of 99 images are bad \(1 missing\), expected at most 1.00%") as caught:
        bad.check(99)
    assert str(tmp_path / "bad.jsonl") in str(caught.value)
    assert "a: No such file" in str(caught.value)
