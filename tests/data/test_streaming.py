"""Samples that are read from shards: which, in which order, and what is refused."""

from __future__ import annotations

import json
import pickle
import tarfile
from collections import Counter
from itertools import chain

import numpy as np
import pytest

from frozenprefix.data.images import load_image
from frozenprefix.data.samplers import BlockOrder, ImageStream, MixedOrder, ShuffledOrder, whole_shares
from frozenprefix.data.samples import group_by_images
from frozenprefix.data.sources import load_source, open_source, parse_source
from frozenprefix.data.streaming.groups import TrainingSet
from frozenprefix.data.streaming.index import beside, ensure_indexes, open_index
from frozenprefix.data.streaming.lines import group_rows
from frozenprefix.data.streaming.remote import check_host
from frozenprefix.errors import BadImageError, ConfigError, DataError
from tests.helpers.shards import streamed, tiny_png, write_shards, write_tar

SIZES = [5, 3, 7, 1, 9]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FROZENPREFIX_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", SIZES)


# ── the order ──


@pytest.mark.parametrize("block", [1, 6, 1000])
def test_an_epoch_of_blocks_has_every_image_once(block):
    order = BlockOrder(SIZES, block, seed=3)
    epochs = [[order.at(place) for place in range(epoch * 25, (epoch + 1) * 25)] for epoch in range(3)]
    for number, pairs in enumerate(epochs):
        assert {epoch for epoch, _ in pairs} == {number}
        assert sorted(image for _, image in pairs) == list(range(25))
    assert epochs[0] != epochs[1]


def test_a_block_is_a_run_of_whole_shards():
    order = BlockOrder([4] * 10, 8, seed=0)
    images = [order.at(place)[1] for place in range(40)]
    blocks = [{image // 4 for image in images[start : start + 8]} for start in range(0, 40, 8)]
    assert [len(shards) for shards in blocks] == [2] * 5
    assert any(images[start : start + 4] != sorted(images[start : start + 4]) for start in range(0, 40, 4))


def test_any_place_can_be_asked_for_first():
    places = [101, 0, 37, 74, 2, 50]
    one = BlockOrder(SIZES, 6, seed=5)
    assert [one.at(place) for place in places] == [BlockOrder(SIZES, 6, seed=5).at(place) for place in places]


def test_a_mixture_has_the_shares_that_it_names():
    sizes = [10, 400, 3]
    order = MixedOrder([ShuffledOrder(size, 0) for size in sizes], sizes, [0.3, 0.6, 0.1], seed=0)
    pairs = [order.at(place) for place in range(4000)]
    sources = [0 if image < 10 else 1 if image < 410 else 2 for _, image in pairs]
    assert Counter(sources) == {0: 1200, 1: 2400, 2: 400}
    for source, (first, size) in enumerate(((0, 10), (10, 400), (410, 3))):
        seen = Counter(image for (_, image), own in zip(pairs, sources, strict=True) if own == source)
        assert set(seen) == set(range(first, first + size))
        assert max(seen.values()) - min(seen.values()) <= 1, "no image of a source twice before all were seen once"
    fresh = MixedOrder([ShuffledOrder(size, 0) for size in sizes], sizes, [0.3, 0.6, 0.1], seed=0)
    assert fresh.at(3210) == pairs[3210]


def test_shares_are_whole_and_complete():
    for weights in ([1, 1, 1], [1e-6, 1, 1], [0.2, 0.8], [5]):
        shares = whole_shares(weights, 1000)
        assert sum(shares) == 1000
        assert min(shares) >= 1


# ── tars ──


def test_streamed_samples_are_those_that_are_read_at_once(shards):
    source = streamed(shards)
    groups = open_source(source)
    listed = load_source({key: value for key, value in source.items() if key != "stream"})
    assert (len(groups), groups.sizes.tolist()) == (25, SIZES)
    for group, sample in zip(groups, listed, strict=True):
        (read,) = group.samples
        assert (read.id, read.targets, read.split) == (sample.id, sample.targets, sample.split)
        assert load_image(read.images[0]).tobytes() == load_image(sample.images[0]).tobytes()
    with pytest.raises(IndexError):
        groups[25]


def test_nothing_is_unpacked_and_the_folder_stays_as_it_was(shards, cache):
    before = sorted(path.name for path in shards.iterdir())
    open_source(streamed(shards))
    assert sorted(path.name for path in shards.iterdir()) == before
    assert len(list((cache / "tar-indexes").iterdir())) == len(SIZES)
    assert not (cache / "unpacked").exists()


def test_an_index_is_made_once_and_again_when_the_tar_changes(shards):
    tar = shards / "00001.tar"
    ensure_indexes([tar])
    first = open_index(tar)
    assert first.samples == 3
    written = first.path.stat().st_mtime_ns
    ensure_indexes([tar])
    assert open_index(tar).path.stat().st_mtime_ns == written
    write_tar(tar, {"a.png": tiny_png(1), "a.txt": b"a"})
    assert open_index(tar) is None
    ensure_indexes([tar])
    assert open_index(tar).samples == 1


def test_braces_name_shards(shards):
    assert len(open_source(streamed(shards, shards="{00000..00002}.tar"))) == 15
    assert len(load_source({"type": "webdataset", "path": str(shards), "captions": "json.captions",
                            "shards": "**/{00003,00004}.tar"})) == 10  # fmt: skip
    with pytest.raises(DataError, match=r"00005\.tar.*1 of 6 are missing"):
        open_source(streamed(shards, shards="{00000..00005}.tar"))


def test_long_names_and_folders_in_tars(tmp_path):
    key = "deep/" + "k" * 150
    write_tar(tmp_path / "s" / "a.tar", {f"{key}.png": tiny_png(7), f"{key}.txt": b"a dog"})
    (group,) = open_source({"type": "webdataset", "path": str(tmp_path / "s"), "stream": True})
    assert group.samples[0].id == f"a/{key}"
    assert load_image(group.images[0]).getpixel((0, 0))[0] == 7


def test_an_image_keeps_its_name_and_not_its_bytes_when_pickled(shards):
    image = open_source(streamed(shards))[0].images[0]
    copy = pickle.loads(pickle.dumps(image))
    assert copy == image
    assert len(pickle.dumps(image)) < 500


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a.png": tiny_png(1)}, "malformed"),
        ({"a.png": tiny_png(1), "a.txt": b" "}, "no target"),
        ({"a.txt": b"a dog"}, "no image in the tar"),
        ({"a.png": tiny_png(1), "a.txt": b"\xff\xfe\xff"}, "malformed"),
        ({"a.png": tiny_png(1), "a.webp": b"x", "a.txt": b"a dog"}, "malformed"),
    ],
)
def test_a_sample_that_cannot_be_used_is_one_bad_image(tmp_path, members, reason):
    write_tar(tmp_path / "s" / "a.tar", members)
    groups = open_source({"type": "webdataset", "path": str(tmp_path / "s"), "stream": True})
    with pytest.raises(BadImageError) as caught:
        groups[0]
    assert caught.value.reason == reason


def test_a_flipped_byte_is_found(shards):
    source = streamed(shards)
    open_source(source)
    tar, index = shards / "00000.tar", open_index(shards / "00000.tar")
    state = tar.stat()
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(bytes(data))
    # as if the index lay beside it, where size alone is compared
    head, entries = index.path.read_bytes().split(b"\n", 1)
    beside(tar).write_bytes(head + b"\n" + entries)
    assert tar.stat().st_size == state.st_size
    with pytest.raises(BadImageError, match="not those that were indexed"):
        open_source(source)[0]
    damaged = bytearray(beside(tar).read_bytes())
    damaged[-1] ^= 1
    beside(tar).write_bytes(bytes(damaged))
    with pytest.raises(BadImageError, match="damaged index"):
        open_source(source)[0]
    beside(tar).write_bytes(b"{}\n")
    with pytest.raises(DataError, match="damaged index"):
        open_source(source)


def special(path, name: str, **fields) -> None:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(info, field, value)
        archive.addfile(info)


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("a.png", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "a link or a device"),
        ("a.png", {"type": tarfile.CHRTYPE}, "a link or a device"),
        ("../a.png", {}, "leaves the folder"),
        ("/a.png", {}, "leaves the folder"),
        ("a.pyd", {}, "pickled"),
        ("a.features.pth", {}, "pickled"),
    ],
)
def test_members_that_no_sample_has_are_refused(tmp_path, name, fields, expected):
    (tmp_path / "s").mkdir()
    special(tmp_path / "s" / "a.tar", name, **fields)
    with pytest.raises(DataError, match=expected):
        open_source({"type": "webdataset", "path": str(tmp_path / "s"), "stream": True})


def test_a_tar_that_is_cut_short_or_compressed_or_mixed_up_is_one_error(shards, tmp_path):
    whole = (shards / "00004.tar").read_bytes()
    (shards / "00004.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="00004"):
        open_source(streamed(shards))
    with tarfile.open(tmp_path / "b.tar", "w:gz") as archive:
        archive.add(shards / "00000.tar", "a.png")
    with pytest.raises(DataError, match="not compressed"):
        open_source({"type": "webdataset", "path": str(tmp_path), "shards": "b.tar", "stream": True})
    png = tiny_png(1)
    write_tar(tmp_path / "c.tar", {"a.png": png, "b.png": png, "a.txt": b"a"})
    with pytest.raises(DataError, match="not next to each other"):
        open_source({"type": "webdataset", "path": str(tmp_path), "shards": "c.tar", "stream": True})


def test_what_a_stream_cannot_do_is_said():
    for options, expected in (({"limit": 3}, "limit"), ({"holdout": {"part": "val"}}, "holdout")):
        with pytest.raises(ConfigError, match=expected):
            parse_source({"type": "webdataset", "path": "p", "stream": True, **options})
    with pytest.raises(ConfigError, match="shuffle_images"):
        parse_source({"type": "webdataset", "path": "p", "shuffle_images": 5})


# ── shards at an address ──


@pytest.fixture
def address(shards):
    import fsspec

    memory = fsspec.filesystem("memory")
    for tar in shards.glob("*.tar"):
        memory.pipe_file(f"/there/{tar.name}", tar.read_bytes())
    yield "memory://there"
    memory.rm("/there", recursive=True)


def test_shards_are_fetched_when_they_are_needed_and_few_are_kept(shards, address, cache):
    source = streamed(shards, path=address, shards="{00000..00004}.tar", remote_gb=25e-6)
    groups, local = open_source(source), open_source(streamed(shards))
    assert (len(groups), groups.digest()) == (len(local), local.digest())
    (folder,) = (cache / "remote").iterdir()
    for number in (24, 0, 8, 15, 3):
        assert [s.targets for s in groups[number].samples] == [s.targets for s in local[number].samples]
        assert load_image(groups[number].images[0]).tobytes() == load_image(local[number].images[0]).tobytes()
        assert sum(tar.stat().st_size for tar in folder.glob("*.tar")) <= 25_000
    assert len(list(folder.glob("*.index"))) == len(SIZES), "indexes stay"
    with pytest.raises(BadImageError, match="remote_gb"):
        open_source({**source, "remote_gb": 1e-6, "shards": "00004.tar"})[0]
    with pytest.raises(DataError, match="is not there"):
        open_source({**source, "shards": "00009.tar"})


def test_no_address_is_opened_that_was_not_asked_for(shards):
    with pytest.raises(ConfigError, match="remote_gb"):
        parse_source(streamed(shards, path="https://example.com/shards"))
    with pytest.raises(ConfigError, match="remote_gb"):
        parse_source(streamed(shards, remote_gb=1))
    for host in ("127.0.0.1", "10.0.0.1", "169.254.169.254", "[::1]", "localhost"):
        with pytest.raises(DataError, match="not a public address"):
            check_host(f"http://{host}:8000/shards")


# ── several sources ──


def test_a_training_set_numbers_images_through_its_sources(shards, tmp_path):
    other = write_shards(tmp_path / "other", [4])
    sources = [open_source(streamed(shards, name="one")), open_source(streamed(other, name="two"))]
    images = TrainingSet(sources)
    assert len(images) == 29
    assert images[26].samples[0].id == "two:00000/000001"
    order = images.order(seed=0)
    assert sorted(order.at(place)[1] for place in range(29)) == list(range(29))
    weighted = TrainingSet(sources, [1.0, 3.0])
    drawn = np.array([weighted.order(seed=0).at(place)[1] for place in range(200)])
    assert 0.6 < np.mean(drawn >= 25) < 0.9
    assert images.digest() != TrainingSet(sources[:1]).digest()


def test_steps_do_not_depend_on_the_number_of_parts(shards):
    images = TrainingSet([open_source(streamed(shards, shuffle_images=8))])
    stream = ImageStream(len(images), 12, 7, images.order(7))
    for step in range(4):
        whole = stream.step(step)
        for parts in (2, 3):
            shared = [stream.step(step)[part::parts] for part in range(parts)]
            assert sorted(chain.from_iterable(shared)) == sorted(whole)


# ── rows of captions.jsonl ──


def test_streamed_lines_are_the_rows_of_the_file(tmp_path):
    names = ["a.png", "b.png", "a.png", "c.png", "b.png", "a.png"]
    rows = [{"image": n, "captions": [f"row {i}"], "split": "train" if i < 5 else "val"} for i, n in enumerate(names)]
    text = "\n".join(json.dumps(row) for row in rows).replace("\n", "\n\n", 1)
    (tmp_path / "captions.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    for name in set(names):
        (tmp_path / name).write_bytes(tiny_png(ord(name[0])))
    source = {"type": "captions", "path": str(tmp_path)}
    for options in ({}, {"split": "train"}, {"split": ["val"]}):
        listed = group_by_images(load_source({**source, **options}))
        streamed_groups = list(open_source({**source, **options, "stream": True}))
        assert streamed_groups == listed
    with pytest.raises(DataError, match="split 'test' is not there"):
        open_source({**source, "split": "test", "stream": True})
    (tmp_path / "captions.jsonl").write_text('{"image": "a.png", "captions": ["a"]}\n{"image"\n')
    with pytest.raises(DataError, match=r"captions.jsonl:2: not JSON"):
        open_source({**source, "stream": True})


def test_rows_are_grouped_in_the_order_of_their_first_ones():
    draw = np.random.default_rng(0)
    keys = draw.integers(0, 40, 200).astype("<u8")
    order, ends = group_rows(keys)
    expected: dict[int, list[int]] = {}
    for row, key in enumerate(keys.tolist()):
        expected.setdefault(key, []).append(row)
    assert [part.tolist() for part in np.split(order, ends[:-1])] == list(expected.values())


# ── tables ──


def rows_of(count: int) -> dict:
    return {
        "image": [{"bytes": tiny_png(number), "path": None} for number in range(count)],
        "captions": [[f"a dog number {number}"] for number in range(count)],
        "label": [number % 2 for number in range(count)],
    }


@pytest.fixture
def table():
    import datasets

    features = datasets.Features(
        image=datasets.Image(), captions=datasets.Sequence(datasets.Value("string")),
        label=datasets.ClassLabel(names=["cat", "dog"]),
    )  # fmt: skip
    return datasets.Dataset.from_dict(rows_of(25), features=features)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_streamed_rows_are_those_that_are_read_at_once(table, tmp_path, kind):
    import datasets

    folder = tmp_path / "data"
    folder.mkdir()
    if kind == "parquet":
        table.to_parquet(folder / "train-00000-of-00002.parquet", batch_size=10)
        table.to_parquet(folder / "train-00001-of-00002.parquet", batch_size=7)
    else:
        datasets.DatasetDict(train=table, test=table.select(range(5))).save_to_disk(folder)
    source = {"type": "hf_dataset", "path": str(folder), "split": "train"}
    listed = load_source(source)
    groups = open_source({**source, "stream": True, "shuffle_images": 12})
    assert groups.sizes.tolist() == ([10, 10, 5, 7, 7, 7, 4] if kind == "parquet" else [25])
    order = groups.order(seed=0)
    images = [order.at(place)[1] for place in range(len(groups))]
    assert sorted(images) == list(range(len(listed)))
    for image in images:
        (read,), sample = groups[image].samples, listed[image]
        assert (read.id, read.targets, read.split) == (sample.id, sample.targets, sample.split)
        assert load_image(read.images[0]).tobytes() == load_image(sample.images[0]).tobytes()
    assert pickle.loads(pickle.dumps(groups.names)) == groups.names
    labels = open_source({**source, "label": "label", "stream": True})
    assert [labels[number].samples[0].targets[0] for number in range(4)] == ["cat", "dog", "cat", "dog"]


def test_only_the_row_groups_of_a_block_are_kept(table, tmp_path):
    table.to_parquet(tmp_path / "a.parquet", batch_size=2)
    groups = open_source({"type": "hf_dataset", "path": str(tmp_path), "stream": True, "shuffle_images": 6})
    order = groups.order(seed=0)
    kept = groups._parts[0].table._kept
    for place in range(25):
        groups[order.at(place)[1]]
        assert sum(part.num_rows for part in kept._kept.values()) <= 8
