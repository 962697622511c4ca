"""Two processes that fill one feature cache, one of them killed at times, and a third that reads meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.cache_writer import encode_images
from frozenprefix.errors import FrozenPrefixError
from frozenprefix.training.trainer import Trainer

PRINT = {"encoder": "mean colour"}
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def encode(batch: list) -> np.ndarray:
    time.sleep(0.005)
    return np.stack([np.asarray(image, np.float32).mean((0, 1))[None] for image in batch])


def fill(paths: list[Path], folder: Path) -> None:
    encode_images(paths, encode, folder, PRINT, batch_size=2, images_per_shard=3)


def read_while_it_grows(folder: Path) -> None:
    while True:
        if (folder / "manifest.json").exists():
            FeatureCache.open(folder, PRINT).verify()


def run_pair(images: list[Path], folder: Path, seed: int, *, kill: bool) -> None:
    """Both get other, overlapping images; the cache must then hold the right features of all of them."""
    rng = random.Random(seed)
    shares = [rng.sample(images, 16), rng.sample(images, 16)]
    writers = [FORK.Process(target=fill, args=(share, folder)) for share in shares]
    reader = FORK.Process(target=read_while_it_grows, args=(folder,))
    for process in (*writers, reader):
        process.start()
    if kill:
        time.sleep(rng.uniform(0.02, 0.3))
        os.kill(writers[0].pid, signal.SIGKILL)
    for process in writers:
        process.join(60)
    codes = [process.exitcode for process in writers]
    assert codes[1] == 0
    assert codes[0] in ((0, -signal.SIGKILL) if kill else (0,))
    assert reader.exitcode is None, "the reader met something that is not whole"
    reader.kill()
    reader.join()
    if kill:
        fill(shares[0], folder)
    wanted = sorted(set(shares[0] + shares[1]))
    cache = FeatureCache.open(folder, PRINT)
    cache.verify()
    expected = encode([Image.open(path) for path in wanted]).astype(np.float16)
    assert np.array_equal(cache.get(cache.keys_of(wanted)), expected)
    assert len(cache) == len(wanted)
    assert len({path.name.partition(".")[0] for path in folder.glob("features-*")}) == len(cache.shards)


@pytest.mark.parametrize("kill", [False, True])
def test_two_processes_fill_one_cache(images, tmp_path, kill):
    for seed in range(4):
        run_pair(images, tmp_path / str(seed), seed, kill=kill)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True])
def test_45_pairs_fill_one_cache(images, tmp_path, kill):
    for seed in range(100, 145):
        run_pair(images, tmp_path / str(seed), seed, kill=kill)


def test_an_image_replaced_with_the_same_size_and_date_is_encoded_again(images, tmp_path):
    path = tmp_path / "image.bmp"
    Image.new("RGB", (4, 4), "red").save(path)
    state = path.stat()
    fill([path], tmp_path / "cache")
    Image.new("RGB", (4, 4), "blue").save(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    fill([path], tmp_path / "cache")
    cache = FeatureCache.open(tmp_path / "cache")
    assert cache.get(cache.keys_of([path])).tolist() == [[[0.0, 0.0, 255.0]]]


def test_two_runs_in_one_output_folder(tiny_recipe, tmp_path):
    """The first one is not disturbed; the second one is told who it is."""
    recipe = tiny_recipe(tmp_path)
    first = Trainer(recipe)
    begin, refused = first.begin, []

    def start_another() -> None:
        process = FORK.Process(target=second_run, args=(recipe, tmp_path / "message"))
        process.start()
        process.join()
        refused.append((tmp_path / "message").read_text())
        begin()

    first.begin = start_another
    assert first.run().steps == 6
    (message,) = refused
    assert message.startswith(f"LockError: output_dir '{tmp_path}' is in use by process {os.getpid()} on ")
    assert not (tmp_path / ".lock.json").exists()


def second_run(recipe, message: Path) -> None:
    try:
        Trainer(recipe).run()
    except FrozenPrefixError as error:
        message.write_text(f"{type(error).__name__}: {error}")
