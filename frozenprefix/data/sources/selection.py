"""Which files of a source are read, and which samples returned: by split, by held-out part, by number of images."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import Holdout
from frozenprefix.errors import DataError, did_you_mean

log = logging.getLogger(__name__)

T = TypeVar("T")


def files_of(root: Path, pattern: str, split: str | list[str] | None = None) -> dict[Path, str | None]:
    """The files that a name or a glob pattern under `root` stands for, sorted → the split that their names tell.

    Files of other splits than the wanted ones are left out, so that they need not be read. The file's own name goes
    before those of its folders.
    """
    files = sorted(path for path in root.glob(pattern) if path.is_file())
    if not files:
        raise DataError(f"{root}: has no file '{pattern}'; check `path` and the fields that name its files")
    splits = {}
    for file in files:
        splits[file] = split_in_name(file.name) or split_in_name(file.relative_to(root).parent.as_posix())
    wanted = of_wanted(splits, split, where=str(root / pattern))
    return {file: splits[file] for file in wanted}


def of_wanted(splits: Mapping[T, str | None], wanted: str | list[str] | None, *, where: str) -> list[T]:
    """What belongs to a wanted split, or may: its split is None when only its samples tell. A name that is not there
    is an error, unless it may yet be among those."""
    if wanted is None:
        return list(splits)
    names = [wanted] if isinstance(wanted, str) else wanted
    if None not in splits.values():
        _check_splits(names, splits.values(), where)
    return [item for item, split in splits.items() if split is None or split in names]


def split_in_name(name: str) -> str | None:
    """The split that a file's name tells: "train", "val", "test" or "testdev"; training and validation count too."""
    found = re.search(r"(?<![a-z])(train|val|testdev|test)(?:ing|idation)?(?![a-z])", name.lower())
    return found.group(1) if found else None


def of_split(samples: list[Sample], split: str | list[str] | None, *, where: str) -> list[Sample]:
    """Keep the samples of the named split(s). A name that no sample has is an error."""
    if split is None:
        return samples
    wanted = [split] if isinstance(split, str) else split
    _check_splits(wanted, (sample.split for sample in samples), where)
    return [sample for sample in samples if sample.split in wanted]


def _check_splits(wanted: list[str], splits: Iterable[str | None], where: str) -> None:
    known = sorted({split for split in splits if split is not None})
    for name in wanted:
        if name not in known:
            there = ", ".join(known) or "none"
            raise DataError(f"{where}: split '{name}' is not there{did_you_mean(name, known)}; splits: {there}")


def in_validation(image: str, fraction: float, seed: int) -> bool:
    """Say whether an image belongs to the validation part: SHA-256 of seed and name, read as a number from 0 to 1."""
    digest = hashlib.sha256(f"{seed}:{image}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def hold_out(samples: Iterable[Sample], holdout: Holdout, root: Path) -> list[Sample]:
    """Return one part of a split by image, with `split` set to its name.

    A sample whose images fall on both sides belongs to neither part, so that no image is ever in both.
    """
    kept, mixed = [], 0
    for sample in samples:
        sides = {in_validation(_name(image, root), holdout.fraction, holdout.seed) for image in sample.images}
        if len(sides) > 1:
            mixed += 1
        elif sides == {holdout.part == "val"}:
            kept.append(replace(sample, split=holdout.part))
    if mixed:
        log.warning("holdout: %d samples show images of both parts and are in neither", mixed)
    return kept


def first_images(samples: list[Sample], limit: int | None) -> list[Sample]:
    """Keep all samples of the first `limit` images (or sets of images), in the order in which these appear."""
    if limit is None:
        return samples
    wanted: dict[tuple[Path, ...], None] = {}
    for sample in samples:
        wanted[sample.images] = None
        if len(wanted) == limit:
            break
    return [sample for sample in samples if sample.images in wanted]


def check_images_exist(samples: list[Sample], *, where: str) -> None:
    """Raise `DataError` when there is no sample, or when not one image file exists: the path is wrong then."""
    if not samples:
        raise DataError(f"{where}: got 0 samples, expected at least one; check split, holdout and limit")
    if not any(image.exists() for sample in samples for image in sample.images):
        images = len({image for sample in samples for image in sample.images})
        raise DataError(
            f"{where}: none of its {images} images exists, first looked for {samples[0].images[0]}; "
            "check the source's `path` and where its images are"
        )


def _name(image: Path, root: Path) -> str:
    return image.relative_to(root).as_posix() if image.is_relative_to(root) else image.name
