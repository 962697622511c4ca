"""The report on a data set: counts, and images that leak from one split into another."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image, ImageEnhance

from frozenprefix.data.check import check_samples, difference_hash, near_pairs
from frozenprefix.data.images import BadImages
from frozenprefix.data.samples import Sample


def photo(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC)


def sample(path, split, *targets, number=0) -> Sample:
    return Sample(id=f"{path.name}-{split}-{number}", images=(path,), targets=targets, split=split)


def test_report(tmp_path):
    for number in range(4):
        photo(number).save(tmp_path / f"{number}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    photo(1).resize((120, 90)).save(tmp_path / "smaller.jpg", quality=80)
    (tmp_path / "empty.png").write_bytes(b"")
    samples = [
        *(sample(tmp_path / f"{number}.png", "train", "a b c", "", number=number) for number in range(3)),
        sample(tmp_path / "copy.png", "val", "a b c d e"),
        sample(tmp_path / "smaller.jpg", "val", "a"),
        sample(tmp_path / "2.png", "val"),
        sample(tmp_path / "empty.png", "val", "a"),
        sample(tmp_path / "none.png", None, "a"),
    ]
    bad, seen = BadImages(), []
    report = check_samples(samples, workers=2, bad=bad, progress=lambda done, total: seen.append((done, total)))

    assert (report.samples, report.images, report.targets) == (8, 7, 10)
    assert report.images_by_split == {"train": 3, "val": 4, "(none)": 1}
    assert report.samples_by_split == {"train": 3, "val": 4, "(none)": 1}
    assert report.target_words == {"min": 0, "median": 1.0, "max": 5}
    assert (report.empty_targets, report.samples_without_targets) == (3, 1)
    assert report.bad_images == {"empty": 1, "missing": 1}
    assert len(bad) == 2
    assert seen[-1] == (7, 7)

    assert report.images_in_two_splits == 1
    assert (report.in_two_splits[0].image, report.in_two_splits[0].other_split) == (str(tmp_path / "2.png"), "val")
    assert (report.duplicate_files, report.same_bytes_across_splits) == (1, 1)
    assert (report.same_bytes[0].image, report.same_bytes[0].other) == (
        str(tmp_path / "copy.png"),
        str(tmp_path / "0.png"),
    )
    assert report.near_duplicates_across_splits == 1
    near = report.near_duplicates[0]
    assert {near.image, near.other} == {str(tmp_path / "smaller.jpg"), str(tmp_path / "1.png")}
    assert report.leaks == 2
    assert json.loads(json.dumps(report.to_dict()))["near_duplicates"][0]["bits"] == near.bits


def test_clean_data_has_no_leak(tmp_path):
    for number in range(6):
        photo(number).save(tmp_path / f"{number}.png")
    report = check_samples([sample(tmp_path / f"{n}.png", "train" if n % 2 else "val", "a") for n in range(6)])
    assert (report.leaks, report.near_duplicates_across_splits, report.bad_images) == (0, 0, {})


def test_nothing_to_report():
    assert check_samples([]).to_dict()["images"] == 0


def test_difference_hash_by_hand():
    ramp = Image.fromarray(np.tile(np.arange(9, dtype=np.uint8) * 20, (8, 1)))
    assert difference_hash(ramp) == 2**64 - 1
    assert difference_hash(ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0
    assert difference_hash(Image.new("L", (9, 8), 7)) == 0


def test_difference_hash_stands_small_changes():
    original = difference_hash(photo(3))
    brighter = difference_hash(ImageEnhance.Brightness(photo(3)).enhance(1.1))
    assert (original ^ brighter).bit_count() <= 4
    assert (original ^ difference_hash(photo(4))).bit_count() > 8


def test_near_pairs_equals_a_loop(monkeypatch):
    monkeypatch.setattr("frozenprefix.data.check._CHUNK", 64)
    rng = np.random.default_rng(0)
    left = rng.integers(0, 2**64, 20, dtype=np.uint64)
    right = np.concatenate(
        [left[:10] ^ np.uint64(0b111 << 60), left[5:9] ^ np.uint64(0b11111), rng.integers(0, 2**64, 9, dtype=np.uint64)]
    )
    expected = [
        [i, j, (int(one) ^ int(two)).bit_count()]
        for i, one in enumerate(left)
        for j, two in enumerate(right)
        if (int(one) ^ int(two)).bit_count() <= 4
    ]
    assert near_pairs(left, right).tolist() == expected
    assert len(expected) == 10
    assert len(near_pairs(left, right[:0])) == 0
