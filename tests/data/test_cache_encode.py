"""Filling the feature cache from images: their keys, batches, ranks, and bad images."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from PIL import Image

from frozenprefix.data.cache import ImageKeys, image_key
from frozenprefix.data.cache_writer import encode_images
from frozenprefix.data.images import BadImages
from frozenprefix.errors import BadImageError, CacheError, DataError
from tests.data.test_cache import PRINT


def photos(folder, count: int) -> list:
    folder.mkdir(exist_ok=True)
    paths = []
    for number in range(count):
        paths.append(folder / f"{number}.png")
        Image.new("RGB", (4, 4), (number, 2 * number, 7)).save(paths[-1])
    return paths


def mean_color(batch: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, np.float32).mean(axis=(0, 1))[None] for image in batch])


def test_keys_follow_bytes_and_are_remembered(tmp_path, monkeypatch):
    first, second = photos(tmp_path / "p", 2)
    keys = ImageKeys(tmp_path)
    assert keys.key_of(first) == image_key(first.read_bytes()) != keys.key_of(second)
    keys.save()
    with (tmp_path / "image-keys-r00.jsonl").open("a") as stream:
        stream.write('["/half a li')
    again = ImageKeys(tmp_path)
    assert again.lookup(first) == keys.key_of(first)
    first.write_bytes(second.read_bytes() + b"x")
    assert again.lookup(first) is None
    assert again.key_of(first) == image_key(first.read_bytes())
    again.save()
    assert ImageKeys(tmp_path).lookup(first) == again.key_of(first)
    with pytest.raises(BadImageError, match="No such file"):
        again.key_of(tmp_path / "none.png")


def test_encode_images(tmp_path):
    paths = photos(tmp_path / "p", 7)
    copy = tmp_path / "p" / "copy.png"
    copy.write_bytes(paths[3].read_bytes())
    batches, progress = [], []

    def encode(batch):
        batches.append(len(batch))
        return mean_color(batch)

    options = {"batch_size": 3, "progress": lambda done, total: progress.append((done, total))}
    cache = encode_images([*paths, copy, paths[0]], encode, tmp_path / "c", PRINT, **options)
    assert batches == [3, 3, 1]
    assert progress[-1] == (8, 8)
    assert len(cache) == 7
    assert cache.key_of(copy) == cache.key_of(paths[3])
    assert cache.key_of(copy) in cache
    assert cache.get(cache.keys_of(paths))[:, 0].tolist() == [[n, 2 * n, 7] for n in range(7)]

    batches.clear()
    more = photos(tmp_path / "p", 8)
    cache = encode_images(more, encode, tmp_path / "c", PRINT, **options)
    assert batches == [1]
    assert cache.get(cache.keys_of(more))[7, 0].tolist() == [7, 14, 7]


def test_encode_images_on_two_ranks(tmp_path):
    paths = photos(tmp_path / "p", 5)
    calls = []
    for rank in (0, 1):
        cache = encode_images(
            paths, mean_color, tmp_path / "c", PRINT, rank=rank, world_size=2, barrier=lambda: calls.append("wait")
        )
    assert len(calls) == 2
    assert len(cache) == 5
    assert len(cache.shards) == 2


def test_encode_counts_bad_images_and_stops_past_the_limit(tmp_path):
    paths = photos(tmp_path / "p", 4)
    paths[1].write_bytes(b"")
    bad = BadImages()
    cache = encode_images(paths, mean_color, tmp_path / "c", PRINT, bad=bad, max_bad_share=0.25)
    assert (len(cache), bad.counts) == (3, {"empty": 1})
    with pytest.raises(DataError, match="1 of 4 images are bad"):
        encode_images(paths, mean_color, tmp_path / "d", PRINT, max_bad_share=0.2)


def test_images_are_decoded_while_the_encoder_works(tmp_path):
    paths = photos(tmp_path / "p", 12)
    decoded, ahead = [], []

    def encode(batch):
        deadline = time.monotonic() + 5
        while len(decoded) < min(12, len(ahead) * 4 + 8) and time.monotonic() < deadline:
            time.sleep(0.002)
        ahead.append((len(decoded), threading.current_thread().name))
        return mean_color(batch)

    def transform(image):
        decoded.append(threading.current_thread().name)
        return image

    encode_images(paths, encode, tmp_path / "c", PRINT, batch_size=4, transform=transform)
    assert ahead[0][0] >= 8
    assert ahead[0][1] not in decoded


@pytest.mark.parametrize("result", [np.zeros((2, 3)), np.zeros((1, 1, 3)), [[1.0]]])
def test_encode_must_return_one_grid_a_image(tmp_path, result):
    with pytest.raises(CacheError, match=r"for 2 images, expected a NumPy array \[2, N, D\]"):
        encode_images(photos(tmp_path / "p", 2), lambda batch: result, tmp_path / "c", PRINT)
