"""Counts and faults of a data set: bad images, empty targets, images that are in two splits."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
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
from frozenprefix.utils import content_hash

#: Two images are near-duplicates when at most this many of the 64 bits of their hashes differ.
NEAR_BITS = 4
#: Reports list this many examples of a finding, and count all.
EXAMPLES = 20

_CHUNK = 1 << 22
_BITS_SET = np.array([value.bit_count() for value in range(1 << 16)], dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Leak:
    """An image of one split that is in another one too; `bits` of the two hashes differ (0: same bytes).

    Example:
        >>> Leak("a.jpg", "train", "b.jpg", "test").bits
        0
    """

    image: str
    split: str
    other: str
    other_split: str
    bits: int = 0


@dataclass(slots=True)
class DataReport:
    """Counts of a data set. Images are files, targets are texts, words are separated by blanks.

    Example:
        >>> DataReport(images_in_two_splits=2).leaks
        2
    """

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
        """Images in two splits, by name or by bytes. Near-duplicates are not counted: a person has to judge them."""
        return self.images_in_two_splits + self.same_bytes_across_splits

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "leaks": self.leaks}


@dataclass(frozen=True, slots=True)
class _ImageHashes:
    content: str
    near: int


def check_samples(
    samples: Sequence[Sample],
    *,
    workers: int = 2,
    examples: int = EXAMPLES,
    bad: BadImages | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Read every image of the samples once and report counts and faults.

    Args:
        workers: decoding threads.
        examples: of a finding, to list; all are counted.
        bad: collects the images that cannot be read.
        progress: called with (images done, images in total).

    Example:
        >>> report = check_samples([Sample("1", (image_path,), ("a dog", ""))])
        >>> report.images, report.empty_targets
        (1, 1)
    """
    bad = BadImages() if bad is None else bad
    splits = _splits_by_image(samples)
    report = _count_texts(samples, splits)
    seen: dict[Path, _ImageHashes] = {}
    with ThreadPoolExecutor(workers) as pool:
        for done, (path, result) in enumerate(zip(splits, pool.map(_look_at, splits), strict=True), start=1):
            if isinstance(result, BadImageError):
                bad.record(path, result)
            else:
                seen[path] = result
            if progress is not None:
                progress(done, len(splits))
    report.bad_images, report.bad_examples = bad.counts, [str(error) for _, error in list(bad)[:examples]]
    report.duplicate_files = len(seen) - len({item.content for item in seen.values()})
    _find_leaks(report, splits, seen, examples)
    return report


def find_leaks(splits: Mapping[Path, Sequence[str]], contents: Mapping[Path, str]) -> list[Leak]:
    """Images in two splits: the same file in both, or files with the same content.

    Args:
        splits: names of the splits of each file.
        contents: a hash of the content of each file; a file without one is compared by path only.

    Example:
        >>> a, b = Path("a.jpg"), Path("b.jpg")
        >>> [leak.other for leak in find_leaks({a: ["train"], b: ["val"]}, {a: "00ff", b: "00ff"})]
        ['a.jpg']
    """
    return _shared_files(splits) + _same_content(splits, contents)


def difference_hash(image: Image.Image) -> int:
    """64-bit dHash: in a 9 x 8 grey thumbnail, whether each pixel is brighter than its left neighbour.

    Example:
        >>> difference_hash(Image.new("RGB", (9, 8)))
        0
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def near_pairs(left: np.ndarray, right: np.ndarray, bits: int = NEAR_BITS) -> np.ndarray:
    """All pairs of hashes uint64[n], uint64[m] that differ in at most `bits` bits: int64[pairs, 3] of i, j, bits.

    Example:
        >>> near_pairs(np.array([0], np.uint64), np.array([255, 3], np.uint64)).tolist()
        [[0, 1, 2]]
    """
    rows = max(1, _CHUNK // max(1, len(right)))
    pairs = [np.empty((0, 3), np.int64)]
    for start in range(0, len(left), rows):
        # [rows, m] → four 16-bit words each → bits that differ
        differing = left[start : start + rows, None] ^ right[None, :]
        distance = _BITS_SET[differing.view(np.uint16)].reshape(*differing.shape, 4).sum(axis=2, dtype=np.uint8)
        i, j = np.nonzero(distance <= bits)
        pairs.append(np.stack([i + start, j, distance[i, j]], axis=1))
    return np.concatenate(pairs)


def _look_at(path: Path) -> _ImageHashes | BadImageError:
    try:
        data = read_image(path)
        return _ImageHashes(content_hash(data), difference_hash(decode_image(data, path)))
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


def _find_leaks(
    report: DataReport, splits: dict[Path, list[str]], seen: dict[Path, _ImageHashes], examples: int
) -> None:
    shared = _shared_files(splits)
    report.images_in_two_splits, report.in_two_splits = len(shared), shared[:examples]

    same = _same_content(splits, {path: item.content for path, item in seen.items()})
    report.same_bytes_across_splits, report.same_bytes = len(same), same[:examples]

    by_split: dict[str, list[Path]] = defaultdict(list)
    for path in seen:
        for name in splits[path]:
            by_split[name].append(path)
    near = [leak for one, two in combinations(by_split, 2) for leak in _near(by_split, one, two, seen)]
    report.near_duplicates_across_splits = len({leak.image for leak in near})
    report.near_duplicates = sorted(near, key=lambda leak: leak.bits)[:examples]


def _shared_files(splits: Mapping[Path, Sequence[str]]) -> list[Leak]:
    return [Leak(str(path), names[0], str(path), names[1]) for path, names in splits.items() if len(names) > 1]


def _same_content(splits: Mapping[Path, Sequence[str]], contents: Mapping[Path, str]) -> list[Leak]:
    """Files with the same content as another file in another split."""
    first: dict[str, Path] = {}
    leaks = []
    for path, content in contents.items():
        other = first.setdefault(content, path)
        elsewhere = [name for name in splits[other] if name not in splits[path]]
        if elsewhere:
            leaks.append(Leak(str(path), splits[path][0], str(other), elsewhere[0]))
    return leaks


def _near(by_split: dict[str, list[Path]], one: str, two: str, seen: dict[Path, _ImageHashes]) -> list[Leak]:
    """For each image of the smaller split, its nearest near-duplicate in the bigger one; same bytes do not count."""
    small, big = sorted((one, two), key=lambda name: len(by_split[name]))
    left, right = (np.array([seen[path].near for path in by_split[name]], np.uint64) for name in (small, big))
    nearest: dict[Path, Leak] = {}
    for i, j, bits in near_pairs(left, right).tolist():
        path, other = by_split[small][i], by_split[big][j]
        if seen[path].content == seen[other].content:
            continue
        if path not in nearest or bits < nearest[path].bits:
            nearest[path] = Leak(str(path), small, str(other), big, bits)
    return list(nearest.values())
