"""Which files of a source are read, and which samples returned: by split, by held-out part, by number of images."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from frozenprefix.data.images import walk_files
from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import Holdout
from frozenprefix.data.sources.image_names import photo_names
from frozenprefix.errors import DataError, did_you_mean
from frozenprefix.utils import content_hash, report, report_left_out

T = TypeVar("T")


def files_of(root: Path, pattern: str, split: str | list[str] | None = None) -> dict[Path, str | None]:
    """The files that match a name or a glob pattern under `root`, sorted → the split in their names.

    A pattern may have braces, as in WebDataset: `train-{00000..00099}.tar`, `{a,b}.tar`.

    Files of other splits are left out, so that they need not be read. The file's own name goes before those of its
    folders.

    Example:
        >>> {path.name: split for path, split in files_of(data_folder, "*.jsonl").items()}
        {'captions.jsonl': None, 'qa.jsonl': None}
    """
    if pattern.startswith("**/"):
        passed_over: dict[Path, str] = {}
        walked = list(walk_files(root, passed_over=passed_over))
        names = [one.removeprefix("**/") for one in without_braces(pattern)]
        files = [path for path in walked if any(path.match(name) for name in names)]
        report(root, len(walked) + len(passed_over), Counter(passed_over.values()), what="names", examples=passed_over)
    else:
        found = {one: [path for path in root.glob(one) if path.is_file()] for one in without_braces(pattern)}
        lost = [one for one, files in found.items() if not files]
        if lost and len(found) > 1:
            raise DataError(f"{root}: has no file '{lost[0]}' of '{pattern}' ({len(lost)} of {len(found)} are missing)")
        files = [path for paths in found.values() for path in paths]
    if not files:
        raise DataError(f"{root}: has no file '{pattern}'; check `path` and the fields that name its files")
    splits = {}
    for file in sorted(files):
        splits[file] = split_in_name(file.name) or split_in_name(file.relative_to(root).parent.as_posix())
    return {file: splits[file] for file in of_wanted(splits, split, where=str(root / pattern))}


def without_braces(pattern: str) -> list[str]:
    """The names, or patterns, that a pattern with braces stands for.

    Raises:
        DataError: the braces do not match.

    Example:
        >>> without_braces("{00..02}.tar")
        ['00.tar', '01.tar', '02.tar']
    """
    if "{" not in pattern:
        return [pattern]
    from braceexpand import braceexpand

    try:
        return list(dict.fromkeys(braceexpand(pattern)))
    except ValueError as error:
        raise DataError(f"'{pattern}': its braces do not match ({error}); expected e.g. {{000..099}}.tar") from error


def of_wanted(splits: Mapping[T, str | None], wanted: str | list[str] | None, *, where: str) -> list[T]:
    """The items of the wanted split(s). Items without a split are kept: their samples name it.

    Raises:
        DataError: no item is of a wanted split, and none is without one.

    Example:
        >>> of_wanted({"a.json": "train", "b.json": "val"}, "val", where="data")
        ['b.json']
    """
    if wanted is None:
        return list(splits)
    names = [wanted] if isinstance(wanted, str) else wanted
    if None not in splits.values():
        check_splits(names, splits.values(), where)
    return [item for item, split in splits.items() if split is None or split in names]


def split_in_name(name: str) -> str | None:
    """The split in a file's name: "train", "val", "test" or "testdev"; training and validation count too.

    Example:
        >>> split_in_name("captions_val2017.json")
        'val'
    """
    match = re.search(r"(?<![a-z])(train|val|testdev|test)(?:ing|idation)?(?![a-z])", name.lower())
    return match.group(1) if match else None


def of_split(samples: list[Sample], split: str | list[str] | None, *, where: str) -> list[Sample]:
    """The samples of the named split(s).

    Raises:
        DataError: no sample has one of these splits.

    Example:
        >>> of_split([Sample("1", (), (), split="val")], "val", where="data")[0].id
        '1'
    """
    if split is None:
        return samples
    names = [split] if isinstance(split, str) else split
    check_splits(names, (sample.split for sample in samples), where)
    return [sample for sample in samples if sample.split in names]


def check_splits(names: list[str], splits: Iterable[str | None], where: str) -> None:
    known = sorted({split for split in splits if split is not None})
    for name in names:
        if name not in known:
            there = ", ".join(known) or "none"
            raise DataError(f"{where}: split '{name}' is not there{did_you_mean(name, known)}; splits: {there}")


def in_validation(image: str, fraction: float, seed: int) -> bool:
    """Whether an image belongs to the validation part: SHA-256 of seed and name, read as a number from 0 to 1.

    Example:
        >>> sum(in_validation(f"{number}.jpg", 0.1, seed=0) for number in range(1000))
        114
    """
    return int(content_hash(f"{seed}:{image}")[:16], 16) < fraction * 2**64


def hold_out(samples: Iterable[Sample], holdout: Holdout, root: Path) -> list[Sample]:
    """One part of a split by image, with `split` set to its name.

    A sample whose images fall on both sides belongs to neither part, so that no image is ever in both.

    Example:
        >>> samples = [Sample(str(number), (Path(f"{number}.jpg"),), ()) for number in range(100)]
        >>> len(hold_out(samples, Holdout(part="train"), Path()))
        92
    """
    samples = list(samples)
    members, mixed, total = [], 0, len(samples)
    names_of = [[part if isinstance(part, str) else _name(part, root) for part in s.group] for s in samples]
    photos: dict[str, str] = {}
    if holdout.versions == "together":
        photos = photo_names({name for names in names_of for name in names})
    for sample, names in zip(samples, names_of, strict=True):
        sides = {in_validation(photos.get(name, name), holdout.fraction, holdout.seed) for name in names}
        if len(sides) > 1:
            mixed += 1
        elif sides == {holdout.part == "val"}:
            members.append(replace(sample, split=holdout.part))
    report_left_out("holdout", total, {"images of both parts": mixed}, what="samples")
    return members


def first_images(samples: list[Sample], limit: int | None) -> list[Sample]:
    """All samples of the first `limit` images (or sets of images), in the order in which these appear.

    Example:
        >>> [sample.id for sample in first_images([Sample(i, (Path(i),), ()) for i in "abc"], 2)]
        ['a', 'b']
    """
    if limit is None:
        return samples
    groups: dict[tuple[Path | str, ...], None] = {}
    for sample in samples:
        groups[sample.group] = None
        if len(groups) == limit:
            break
    return [sample for sample in samples if sample.group in groups]


def check_images_exist(samples: list[Sample], *, where: str) -> None:
    """Check that there are samples, and that an image file exists; if none does, a path is wrong.

    Raises:
        DataError: there is no sample, or no image.

    Example:
        >>> check_images_exist([Sample("1", (image_path,), ())], where="data")
    """
    if not samples:
        raise DataError(f"{where}: got 0 samples, expected at least one; check split, holdout and limit")
    images = list(dict.fromkeys(image for sample in samples for image in sample.images))
    # os.path: False for a name that no file can have
    if images and not any(os.path.exists(image) for image in images):
        raise DataError(
            f"{where}: none of its {len(images)} images exists, first looked for {images[0]}; "
            "check the source's `path` and where its images are"
        )


def _name(image: Path, root: Path) -> str:
    return image.relative_to(root).as_posix() if image.is_relative_to(root) else image.name
