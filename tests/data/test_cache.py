"""The feature cache on disk: what is written is read, and nothing damaged or foreign ever is."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import webdataset

from frozenprefix.data import cache_writer
from frozenprefix.data.cache import FeatureCache, repair_cache
from frozenprefix.data.cache_writer import FeatureCacheWriter
from frozenprefix.errors import CacheError, LockError

PRINT = {"encoder": "abc", "layer": -1, "layers": (1, 2)}
N, D = 3, 8


def features(count: int, seed: int = 0, tokens: int = N) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, tokens, D)).astype(np.float32)


def written(folder, count: int = 5, *, shard: int = 2, dtype="float16", rank: int = 0, start: int = 0) -> np.ndarray:
    values = features(start + count)
    with FeatureCacheWriter(folder, PRINT, dtype=dtype, images_per_shard=shard, rank=rank) as writer:
        writer.add([f"k{number}" for number in range(start, start + count)], values[start:])
    return values


@pytest.mark.parametrize(
    ("dtype", "read_as", "error"),
    [("float16", np.float16, 1e-3), ("bfloat16", np.float32, 4e-3), ("int8", np.float32, 4e-3)],
)
def test_what_is_written_is_read(tmp_path, dtype, read_as, error):
    values = written(tmp_path, dtype=dtype)
    cache = FeatureCache.open(tmp_path, PRINT)
    assert (len(cache), cache.tokens, cache.dim, len(cache.shards)) == (5, N, D, 3)
    order = [4, 0, 4, 2]
    read = cache.get([f"k{number}" for number in order])
    assert read.dtype == read_as
    assert read.shape == (4, N, D)
    scale = np.abs(values[order]).max(axis=2, keepdims=True)
    assert (np.abs(read.astype(np.float32) - values[order]) <= error * scale).all()
    assert cache.get([]).shape == (0, N, D)
    cache.verify()


def test_bfloat16_rounds_as_torch_does(tmp_path):
    torch = pytest.importorskip("torch")
    values = written(tmp_path, dtype="bfloat16")
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    assert np.array_equal(FeatureCache.open(tmp_path).get([f"k{n}" for n in range(5)]), expected)


def test_int8_keeps_rows_of_zeros(tmp_path):
    with FeatureCacheWriter(tmp_path, PRINT, dtype="int8") as writer:
        writer.add(["a"], np.zeros((1, N, D), np.float32))
    assert not FeatureCache.open(tmp_path).get(["a"]).any()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_webdataset_reads_the_shards(tmp_path, dtype):
    values = written(tmp_path, dtype=dtype)
    cache = FeatureCache.open(tmp_path)
    rows = list(webdataset.WebDataset(cache.shards, shardshuffle=False).decode())
    assert [row["__key__"] for row in rows] == [f"k{number}" for number in range(5)]
    for number, row in enumerate(rows):
        read = row["features.npy"] if dtype == "float16" else row["features.npy"] * row["scale.npy"]
        assert np.array_equal(read, cache.get([f"k{number}"])[0])
        assert np.allclose(read, values[number], atol=0.03)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({**PRINT, "layer": -2}, r"field 'layer' differs: the cache has -1, expected -2"),
        ({**PRINT, "encoder": "x", "layer": -2}, r"field 'encoder' differs: the cache has 'abc', expected 'x'"),
        ({**PRINT, "pool": "mean"}, r"field 'pool' differs: the cache has nothing, expected 'mean'"),
        ({"encoder": "abc", "layers": [1, 2]}, r"field 'layer' differs: the cache has -1, expected nothing"),
    ],
)
def test_another_fingerprint_is_refused(tmp_path, wanted, message):
    written(tmp_path)
    with pytest.raises(CacheError, match=message):
        FeatureCache.open(tmp_path, wanted)
    with pytest.raises(CacheError, match=message):
        FeatureCacheWriter(tmp_path, wanted)


def test_another_dtype_or_shape_is_refused(tmp_path):
    written(tmp_path)
    with pytest.raises(CacheError, match="storage dtype differs: the cache has float16, expected int8"):
        FeatureCacheWriter(tmp_path, PRINT, dtype="int8")
    with (
        FeatureCacheWriter(tmp_path, PRINT) as writer,
        pytest.raises(CacheError, match=r"got \[4, 8\] an image, expected \[3, 8\]"),
    ):
        writer.add(["new"], features(1, tokens=4))


def test_features_that_cannot_be_stored(tmp_path):
    with FeatureCacheWriter(tmp_path, PRINT) as writer:
        with pytest.raises(CacheError, match="use storage dtype 'bfloat16'"):
            writer.add(["a"], np.full((1, N, D), 70_000.0))
        for value in (np.nan, np.inf):
            with pytest.raises(CacheError, match="check the encoder"):
                writer.add(["a"], np.full((1, N, D), value))
        with pytest.raises(CacheError, match=r"key: got 'a\.b'"):
            writer.add(["a.b"], features(1))
        with pytest.raises(CacheError, match=r"got shape \(2, 3, 8\) for 1 keys"):
            writer.add(["a"], features(2))
    with pytest.raises(CacheError, match="not a feature cache"):
        FeatureCache.open(tmp_path)


def test_missing_keys_are_counted(tmp_path):
    written(tmp_path)
    with pytest.raises(CacheError, match="no features for key x, 2 of 3 are missing"):
        FeatureCache.open(tmp_path).get(["k0", "x", "y"])


def test_a_second_run_adds_only_what_is_new(tmp_path):
    written(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    with FeatureCacheWriter(tmp_path, PRINT, images_per_shard=2) as writer:
        assert "k4" in writer
        writer.add(["k4", "k5"], features(2))
    cache = FeatureCache.open(tmp_path)
    assert len(cache) == 6
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}.items()
    assert np.array_equal(cache.get(["k4"])[0], features(5)[4].astype(np.float16))


def test_ranks_write_shards_of_their_own(tmp_path):
    values = written(tmp_path, 3, rank=0)
    written(tmp_path, 3, rank=1, start=3)
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == [
        f"features-r0{rank}-00000{number}.tar" for rank in (0, 1) for number in (1, 2)
    ]
    assert np.array_equal(FeatureCache.open(tmp_path).get(["k1"])[0], values[1].astype(np.float16))
    assert len(FeatureCache.open(tmp_path)) == 6


@pytest.mark.parametrize("damage", ["cut", "no index", "bad index"])
def test_damage_is_named_and_repaired(tmp_path, damage):
    values = written(tmp_path)
    shard = tmp_path / "features-r00-000001.tar"
    index = tmp_path / "features-r00-000001.index.json"
    left = 3
    if damage == "cut":
        os.truncate(shard, 1000)
    elif damage == "no index":
        index.unlink()
        left = 5
    else:
        index.write_text(index.read_text()[:-20])
        left = 5
    with pytest.raises(CacheError, match=r"features-r00-000001\..*frozenprefix cache RECIPE --repair"):
        FeatureCache.open(tmp_path)
    assert repair_cache(tmp_path) == left
    assert len(FeatureCache.open(tmp_path)) == left
    written(tmp_path)
    repaired = FeatureCache.open(tmp_path)
    repaired.verify()
    assert np.array_equal(repaired.get([f"k{n}" for n in range(5)]), values.astype(np.float16))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_changed_bytes_are_found(tmp_path, dtype):
    written(tmp_path, dtype=dtype)
    cache = FeatureCache.open(tmp_path)
    shard, entry = cache._places["k1"]
    original = shard.read_bytes()
    for place in (entry.offset, entry.offset + entry.length - 1, entry.scale_offset or entry.offset + 130):
        data = bytearray(original)
        data[place] ^= 1
        shard.write_bytes(data)
        for read in (FeatureCache.open(tmp_path).verify, lambda: FeatureCache.open(tmp_path).get(["k0", "k1"])):
            with pytest.raises(CacheError, match=r"000001.tar: the features of k1 are damaged"):
                read()
    assert repair_cache(tmp_path) == 3
    assert (tmp_path / "features-r00-000001.tar.damaged").exists()


def test_repair_compares_a_shard_of_another_length_with_its_checksums(tmp_path):
    written(tmp_path)
    shard, entry = FeatureCache.open(tmp_path)._places["k1"]
    data = bytearray(shard.read_bytes() + bytes(512))
    data[entry.offset + entry.length - 1] ^= 1
    shard.write_bytes(data)
    assert repair_cache(tmp_path) == 3


def test_a_lost_manifest_cannot_be_guessed(tmp_path):
    written(tmp_path)
    (tmp_path / "manifest.json").unlink()
    for attempt in (lambda: FeatureCache.open(tmp_path), lambda: repair_cache(tmp_path), lambda: written(tmp_path)):
        with pytest.raises(CacheError, match=r"manifest\.json is missing"):
            attempt()


def test_a_lost_shard_is_written_again(tmp_path):
    values = written(tmp_path)
    (tmp_path / "features-r00-000001.tar").unlink()
    assert sorted(FeatureCache.open(tmp_path)) == ["k2", "k3", "k4"]
    written(tmp_path)
    assert np.array_equal(FeatureCache.open(tmp_path).get(["k1"])[0], values[1].astype(np.float16))


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path):
    """Killed between index and shard: the index lies there, and the shard has its temporary name."""
    written(tmp_path)
    (tmp_path / "features-r00-000002.tar").rename(tmp_path / "features-r00-current.tar.tmp")
    assert len(FeatureCache.open(tmp_path)) == 3
    written(tmp_path)
    assert len(FeatureCache.open(tmp_path)) == 5
    assert not list(tmp_path.glob("*.tmp"))
    assert len(list(tmp_path.glob("*.tar"))) == len(list(tmp_path.glob("*.index.json"))) == 3


def test_repair_waits_for_no_writer_but_names_it(tmp_path):
    written(tmp_path)
    with FeatureCacheWriter(tmp_path, PRINT) as writer:
        writer.add(["new"], features(1))
        with pytest.raises(LockError, match=rf"feature cache '.*' is in use by process {os.getpid()} on .*, since 20"):
            repair_cache(tmp_path)
    assert repair_cache(tmp_path) == 6


def test_disk_full_leaves_what_was_good(tmp_path, monkeypatch):
    values = written(tmp_path, 4)
    addfile, calls = cache_writer.tarfile.TarFile.addfile, []

    def full(tar, member, stream):
        calls.append(member.name)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        addfile(tar, member, stream)

    monkeypatch.setattr(cache_writer.tarfile.TarFile, "addfile", full)
    writer = FeatureCacheWriter(tmp_path, PRINT, images_per_shard=2)
    with pytest.raises(CacheError, match=r"the disk is full; make room and run again.*1 images of the unfinished"):
        writer.add([f"k{n}" for n in range(4, 9)], features(9)[4:])
    writer.close()
    cache = FeatureCache.open(tmp_path)
    assert len(cache) == 6
    assert np.array_equal(cache.get(["k1"])[0], values[1].astype(np.float16))
    assert not list(tmp_path.glob("*.tmp"))


def test_an_interrupt_keeps_whole_images(tmp_path):
    def interrupted() -> None:
        with FeatureCacheWriter(tmp_path, PRINT) as writer:
            writer.add(["a", "b"], features(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    FeatureCache.open(tmp_path).verify()
    assert len(FeatureCache.open(tmp_path)) == 2


def test_a_killed_process_leaves_whole_shards(tmp_path):
    script = textwrap.dedent(f"""
        import numpy as np, time
        from frozenprefix.data.cache_writer import FeatureCacheWriter
        writer = FeatureCacheWriter({str(tmp_path)!r}, {PRINT!r}, images_per_shard=2)
        writer.add([f"k{{n}}" for n in range(5)], np.ones((5, {N}, {D}), np.float32))
        print("ready", flush=True)
        time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert list(tmp_path.glob("*.tmp"))
    assert sorted(FeatureCache.open(tmp_path)) == ["k0", "k1", "k2", "k3"]
    written(tmp_path)
    assert len(FeatureCache.open(tmp_path)) == 5


def test_workers_get_a_cache_of_their_own(tmp_path):
    values = written(tmp_path)
    cache = FeatureCache.open(tmp_path)
    cache.get(["k0"])
    assert np.array_equal(pickle.loads(pickle.dumps(cache)).get(["k3"])[0], values[3].astype(np.float16))


def test_random_access_is_fast(tmp_path):
    rng = np.random.default_rng(0)
    with FeatureCacheWriter(tmp_path, PRINT) as writer:
        writer.add([f"k{n}" for n in range(64)], rng.normal(size=(64, 49, 1280)).astype(np.float32))
    cache = FeatureCache.open(tmp_path)
    keys = [f"k{n}" for n in rng.permutation(64)]
    times = []
    for _ in range(7):
        start = time.process_time()
        cache.get(keys)
        times.append(time.process_time() - start)
    assert min(times) < 0.030, "8 MB are copied, and nothing else is read"


def test_manifest_is_readable(tmp_path):
    written(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text()) == {
        "format": 1,
        "fingerprint": {"encoder": "abc", "layer": -1, "layers": [1, 2]},
        "dtype": "float16",
        "tokens": N,
        "dim": D,
    }
