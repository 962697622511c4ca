"""Every way in gives the same pixels; images that cannot be used say why."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, PngImagePlugin

from frozenprefix.data.features import FeatureStorage, fill_feature_cache
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.data.images import BadImages, decode_image, load_image, to_image
from frozenprefix.errors import BadImageError
from frozenprefix.models.processing import FrozenPrefixProcessor
from tests.helpers.lm import make_tokenizer

RANDOM = np.random.default_rng(0)
NOISE = RANDOM.integers(0, 256, (48, 64, 3), dtype=np.uint8)
GREY_16 = RANDOM.integers(0, 65536, (48, 64)).astype(np.uint16)
FLOAT = RANDOM.normal(size=(48, 64)).astype(np.float32)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return encoded(Image.fromarray(NOISE), "PNG", exif=exif)


FILES = {
    "rgb.png": encoded(Image.fromarray(NOISE), "PNG"),
    "rotated.png": rotated(),
    "grey16.png": encoded(Image.fromarray(GREY_16), "PNG"),
    "grey16.tif": encoded(Image.fromarray(GREY_16), "TIFF"),
    "float.tif": encoded(Image.fromarray(FLOAT), "TIFF"),
    "bits.png": encoded(Image.fromarray(NOISE).convert("1"), "PNG"),
    "palette.gif": encoded(Image.fromarray(NOISE).convert("P"), "GIF"),
    "alpha.png": encoded(Image.fromarray(np.dstack([NOISE, NOISE[:, :, :1]])), "PNG"),
    "cmyk.jpg": encoded(Image.fromarray(NOISE).convert("CMYK"), "JPEG"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("name", FILES)
def test_file_bytes_pil_and_address_give_the_same_pixels(name, tmp_path, server):
    (tmp_path / name).write_bytes(FILES[name])
    expected = np.asarray(load_image(tmp_path / name))
    ways = [str(tmp_path / name), FILES[name], Image.open(tmp_path / name), f"{server}/{name}"]
    for way in ways:
        image = to_image(way)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("name", ["rgb.png", "grey16.png", "grey16.tif", "float.tif", "bits.png", "alpha.png"])
def test_arrays_and_tensors_of_the_same_values_give_the_same_pixels(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    expected = np.asarray(load_image(tmp_path / name))
    values = np.asarray(Image.open(tmp_path / name))
    ways = [values, torch.from_numpy(values.copy())]
    if values.ndim == 3:
        ways += [values.transpose(2, 0, 1), torch.from_numpy(values.copy()).permute(2, 0, 1)]
    else:
        ways += [values[None], values[:, :, None]]
    for way in ways:
        assert np.array_equal(np.asarray(to_image(way)), expected)


@pytest.mark.parametrize(
    "values",
    [NOISE / 255.0, NOISE.astype(np.float32), NOISE.astype(np.int64), (NOISE / 255.0).astype(np.float16)],
    ids=["unit", "float", "int64", "half"],
)
def test_other_ranges_of_three_channels(values):
    assert np.abs(np.asarray(to_image(values)).astype(int) - NOISE).max() <= (values.dtype == np.float16)


@pytest.mark.parametrize(
    "value",
    [
        *(np.zeros(3), np.zeros((5, 5, 5)), np.zeros((0, 3)), np.full((2, 2, 3), np.nan), np.array([["a"]])),
        *(NOISE / 128.0 - 1.0, NOISE * 300.5, 3, None, [1, 2]),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused(value):
    with pytest.raises(BadImageError) as caught:
        to_image(value, "pixels of a test")
    assert caught.value.reason == "unsupported"
    assert "pixels of a test" in str(caught.value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied_to_pil_images_too(orientation, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(NOISE).save(tmp_path / "a.png", exif=exif)
    image = Image.open(tmp_path / "a.png")
    assert np.array_equal(np.asarray(to_image(image)), np.asarray(load_image(tmp_path / "a.png")))
    assert image.getexif()[ExifTags.Base.Orientation] == orientation  # the caller's image is as it was


# ── thin images ──


@pytest.mark.parametrize("size", [(60000, 1), (1, 60000), (30000, 2)])
def test_thin_images_are_refused_before_they_are_resized(size):
    data = encoded(Image.new("L", size), "PNG")
    for way in (data, Image.open(io.BytesIO(data)), np.zeros(size[::-1], np.uint8)):
        with pytest.raises(BadImageError) as caught:
            to_image(way)
        assert caught.value.reason == "too_thin"
        assert f"{size[0]} x {size[1]} pixels" in str(caught.value)
    assert to_image(Image.new("L", (200, 1))).size == (200, 1)


# ── long texts and profiles ──


def long_text(kind: str) -> dict:
    info = PngImagePlugin.PngInfo()
    match kind:
        case "text":
            info.add_text("comment", "x" * 3_000_000)
        case "zip":
            info.add_text("comment", "x" * 3_000_000, zip=True)
        case "itxt":
            info.add_itxt("comment", "x" * 3_000_000, zip=True)
        case "profile":
            return {"icc_profile": bytes(3_000_000)}
    return {"pnginfo": info}


@pytest.mark.parametrize("kind", ["text", "zip", "itxt", "profile"])
def test_megabytes_of_text_or_profile_do_not_hide_the_image(kind):
    data = encoded(Image.fromarray(NOISE), "PNG", **long_text(kind))
    assert np.array_equal(np.asarray(decode_image(data)), NOISE)


def test_long_text_behind_the_pixels():
    data = encoded(Image.fromarray(NOISE), "PNG")
    content = b"comment\0\0" + zlib.compress(b"x" * 3_000_000)
    chunk = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    data = data[:-12] + chunk + data[-12:]
    assert np.array_equal(np.asarray(decode_image(data)), NOISE)
    with pytest.raises(BadImageError) as caught:
        decode_image(data[:600])
    assert caught.value.reason in ("truncated", "not_an_image")


# ── formats that need more than Pillow ──


def test_heic_is_read_with_pillow_heif_and_named_without_it(monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    data = encoded_heif(heif)
    assert to_image(data).size == (64, 48)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(Image, "OPEN", {name: opener for name, opener in Image.OPEN.items() if name != "HEIF"})
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    with pytest.raises(BadImageError, match=r"a HEIC image, which needs pillow-heif: pip install") as caught:
        to_image(data)
    assert caught.value.reason == "unsupported"


def encoded_heif(heif) -> bytes:
    buffer = io.BytesIO()
    heif.from_pillow(Image.fromarray(NOISE)).save(buffer)
    return buffer.getvalue()


def tiff(bits: int, planes: int = 1) -> bytes:
    """An uncompressed RGB TIFF of 3 x 2 pixels."""
    size = 18 * bits // 8
    offsets = [152 + number * size // planes for number in range(planes)]
    place = 140 if planes > 1 else offsets[0]
    tags = [(256, 4, 1, 3), (257, 4, 1, 2), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, planes, place)]
    tags += [(277, 3, 1, 3), (278, 4, 1, 2), (279, 4, 1, size // planes), (284, 3, 1, 2 if planes > 1 else 1)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    data = head.ljust(134, b"\0") + struct.pack("<3H", bits, bits, bits) + struct.pack(f"<{planes}I", *offsets)
    return data.ljust(152, b"\0") + bytes(range(size))


def test_a_tiff_of_8_bits_is_read():
    assert to_image(tiff(8)).size == (3, 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff(32), "3 channels of 32 bits, which Pillow does not read"),
        (tiff(16, 3), "3 channels of 16 bits in separate"),
    ],
    ids=["wide", "planes"],
)
def test_tiff_files_that_pillow_cannot_read_say_what_they_are(data, message):
    with pytest.raises(BadImageError, match=f"a TIFF file with {message}") as caught:
        to_image(data)
    assert caught.value.reason == "unsupported"


# ── through the processors ──


def processors():
    from transformers import CLIPImageProcessor

    from frozenprefix.models.vision.image_processing import make_image_processor

    size = {"shortest_edge": 24}
    yield make_image_processor(
        image_size=24, resize_mode="shortest", interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    yield CLIPImageProcessor(size=size, crop_size={"height": 24, "width": 24})


@pytest.mark.parametrize("image_processor", processors(), ids=lambda processor: type(processor).__name__)
@pytest.mark.parametrize("name", FILES)
def test_processors_give_the_same_values_for_every_way_in(name, image_processor, tmp_path):
    processor = FrozenPrefixProcessor(image_processor, make_tokenizer(), prefix_length=2)
    (tmp_path / name).write_bytes(FILES[name])
    values = []
    for way in (load_image(tmp_path / name), tmp_path / name, FILES[name], Image.open(tmp_path / name)):
        for images in (way, [way], [[way]]):
            batch = processor(images=images, text="<image>", return_tensors="pt")
            values.append(batch["pixel_values"].reshape(3, 24, 24))
    assert all(torch.equal(value, values[0]) for value in values)


def test_the_own_image_processor_reads_every_way_in_itself(tmp_path):
    image_processor = next(processors())
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
        ways = [load_image(tmp_path / name), Image.open(tmp_path / name), data, str(tmp_path / name)]
        values = [image_processor(way, return_tensors="pt")["pixel_values"] for way in ways]
        assert all(torch.equal(value, values[0]) for value in values), name


# ── errors behind decoding ──


@pytest.mark.parametrize("error", [MemoryError(), ValueError("too wide"), ZeroDivisionError(), RuntimeError("resize")])
def test_an_error_of_the_image_processor_costs_one_image(captioner, tmp_path, monkeypatch, error):
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        Image.new("RGB", (8 + number, 8)).save(path)
    encoder = ImageEncoder.from_model(captioner.model, captioner.processor)
    kind = type(encoder.image_processor)
    original = kind.preprocess

    def fail_on_one(self, images, *args, **kwargs):
        if images[0].width == 9:
            raise error
        return original(self, images, *args, **kwargs)

    monkeypatch.setattr(kind, "preprocess", fail_on_one)
    bad = BadImages()
    encoded = [path for files, _ in encoder.batches(paths, 2, bad) for path in files]
    assert encoded == [paths[0], paths[2]]
    assert bad.counts == {"unprocessable": 1}
    bad = BadImages()
    storage = FeatureStorage(str(tmp_path / "cache"))
    cache, encoded_now = fill_feature_cache(encoder, paths, storage, bad=bad, max_bad_share=0.5)
    assert (len(cache), encoded_now, bad.counts) == (2, 2, {"unprocessable": 1})
