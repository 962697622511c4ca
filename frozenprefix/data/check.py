"""What is in a data set, and what is wrong with it: bad images, empty targets, images that leak across splits."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from frozenprefix.data.images import BadImages, decode_image, read_image
from frozenprefix.data.samples import Sample
from frozenprefix.errors import BadImageError

#: Two images are near-duplicates when at most this many of the 64 bits of their hashes differ.
NEAR_BITS = 4
#: Reports list this many examples of a finding, and count all.
EXAMPLES = 20

_CHUNK = 1 << 22
_BITS_SET = np.array([value.bit_count() for value in range(1 << 16)], dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Leak:
    """An image of one split that is in another one too; `bits` differ between the hashes (0: same bytes)."""

    image: str
    split: str
    other: str
    other_split: str
    bits: int = 0


@dataclass(slots=True)
class DataReport:
    """Counts of a data set. Images are files; targets are texts; words are what blanks separate."""

    samples: int = 0
    images: int = 0
    targets: int = 0
    images_by_split: dict[str, int] = field(default_factory=dict)
    samples_by_split: dict[str, int] = field(default_factory=dict)
    targets_per_image: float = 0.0
    target_words: dict[str, float] = field(default_factory=dict)
    empty_targets: int = 0
    samples_without_targets: int = 0
    bad_images: dict[str, int] = field(default_factory=dict)
    bad_examples: list[str] = field(default_factory=list)
    duplicate_files: int = 0
    images_in_two_splits: int = 0
    same_bytes_across_splits: int = 0
    near_duplicates_across_splits: int = 0
    in_two_splits: list[Leak] = field(default_factory=list)
    same_bytes: list[Leak] = field(default_factory=list)
    near_duplicates: list[Leak] = field(default_factory=list)

    @property
    def leaks(self) -> int:
        """Images known to be in two splits: by name or by their bytes. Near-duplicates are for a person to judge."""
        return self.images_in_two_splits + self.same_bytes_across_splits

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "leaks": self.leaks}


@dataclass(frozen=True, slots=True)
class _Seen:
    digest: bytes
    hash: int


def check_samples(
    samples: Sequence[Sample],
    *,
    workers: int = 2,
    bad: BadImages | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Read every image of the samples once and report what was found.

    Args:
        workers: decoding threads.
        bad: takes the images that cannot be read, to be listed in a file.
        progress: called with (images done, images in all).
    """
    bad = BadImages() if bad is None else bad
    splits = _splits_by_image(samples)
    report = _count_texts(samples, splits)
    seen: dict[Path, _Seen] = {}
    with ThreadPoolExecutor(workers) as pool:
        for done, (path, result) in enumerate(zip(splits, pool.map(_look_at, splits), strict=True), start=1):
            if isinstance(result, BadImageError):
                bad.record(path, result)
            else:
                seen[path] = result
            if progress is not None:
                progress(done, len(splits))
    report.bad_images, report.bad_examples = bad.counts, [str(error) for _, error in list(bad)[:EXAMPLES]]
    report.duplicate_files = len(seen) - len({item.digest for item in seen.values()})
    _find_leaks(report, splits, seen)
    return report


def difference_hash(image: Image.Image) -> int:
    """64-bit dHash: in a 9 x 8 grey thumbnail, whether each pixel is brighter than its left neighbour."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def near_pairs(left: np.ndarray, right: np.ndarray, bits: int = NEAR_BITS) -> np.ndarray:
    """All pairs of hashes uint64[n], uint64[m] that differ in at most `bits` bits: int64[pairs, 3] of i, j, bits."""
    rows = max(1, _CHUNK // max(1, len(right)))
    found = [np.empty((0, 3), np.int64)]
    for start in range(0, len(left), rows):
        # [rows, m] → four 16-bit words each → bits that differ
        differing = left[start : start + rows, None] ^ right[None, :]
        distance = _BITS_SET[differing.view(np.uint16)].reshape(*differing.shape, 4).sum(axis=2, dtype=np.uint8)
        i, j = np.nonzero(distance <= bits)
        found.append(np.stack([i + start, j, distance[i, j]], axis=1))
    return np.concatenate(found)


def _look_at(path: Path) -> _Seen | BadImageError:
    try:
        data = read_image(path)
        return _Seen(hashlib.sha256(data).digest(), difference_hash(decode_image(data, path)))
    except BadImageError as error:
        return error


def _splits_by_image(samples: Sequence[Sample]) -> dict[Path, list[str]]:
    splits: dict[Path, list[str]] = {}
    for sample in samples:
        name = sample.split or "(none)"
        for image in sample.images:
            names = splits.setdefault(image, [])
            if name not in names:
                names.append(name)
    return splits


def _count_texts(samples: Sequence[Sample], splits: dict[Path, list[str]]) -> DataReport:
    targets = [target for sample in samples for target in sample.targets]
    words = [len(target.split()) for target in targets]
    return DataReport(
        samples=len(samples),
        images=len(splits),
        targets=len(targets),
        images_by_split=dict(Counter(name for names in splits.values() for name in names)),
        samples_by_split=dict(Counter(sample.split or "(none)" for sample in samples)),
        targets_per_image=len(targets) / len(splits) if splits else 0.0,
        target_words={"min": min(words), "median": statistics.median(words), "max": max(words)} if words else {},
        empty_targets=sum(count == 0 for count in words),
        samples_without_targets=sum(not sample.targets for sample in samples),
    )


def _find_leaks(report: DataReport, splits: dict[Path, list[str]], seen: dict[Path, _Seen]) -> None:
    shared = [Leak(str(path), names[0], str(path), names[1]) for path, names in splits.items() if len(names) > 1]
    report.images_in_two_splits, report.in_two_splits = len(shared), shared[:EXAMPLES]

    same = _same_bytes(splits, seen)
    report.same_bytes_across_splits, report.same_bytes = len(same), same[:EXAMPLES]

    by_split: dict[str, list[Path]] = defaultdict(list)
    for path in seen:
        for name in splits[path]:
            by_split[name].append(path)
    near = [leak for one, two in combinations(by_split, 2) for leak in _near(by_split, one, two, seen)]
    report.near_duplicates_across_splits = len({leak.image for leak in near})
    report.near_duplicates = sorted(near, key=lambda leak: leak.bits)[:EXAMPLES]


def _same_bytes(splits: dict[Path, list[str]], seen: dict[Path, _Seen]) -> list[Leak]:
    """Every file whose bytes were seen before under another name in another split."""
    first: dict[bytes, Path] = {}
    leaks = []
    for path, item in seen.items():
        other = first.setdefault(item.digest, path)
        elsewhere = [name for name in splits[other] if name not in splits[path]]
        if elsewhere:
            leaks.append(Leak(str(path), splits[path][0], str(other), elsewhere[0]))
    return leaks


def _near(by_split: dict[str, list[Path]], one: str, two: str, seen: dict[Path, _Seen]) -> list[Leak]:
    """The nearest look-alike in the bigger split of each image in the smaller one, same bytes excepted."""
    small, big = sorted((one, two), key=lambda name: len(by_split[name]))
    left, right = (np.array([seen[path].hash for path in by_split[name]], np.uint64) for name in (small, big))
    nearest: dict[Path, Leak] = {}
    for i, j, bits in near_pairs(left, right).tolist():
        path, other = by_split[small][i], by_split[big][j]
        if seen[path].digest == seen[other].digest:
            continue
        if path not in nearest or bits < nearest[path].bits:
            nearest[path] = Leak(str(path), small, str(other), big, bits)
    return list(nearest.values())
