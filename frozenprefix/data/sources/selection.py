"""Which samples of a source are returned: by split, by held-out part, by number of pictures."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import Holdout
from frozenprefix.errors import DataError, did_you_mean

log = logging.getLogger(__name__)


def of_split(samples: list[Sample], split: str | list[str] | None, *, where: str) -> list[Sample]:
    """Keep the samples of the named split(s). A name that no sample has is an error."""
    if split is None:
        return samples
    wanted = [split] if isinstance(split, str) else split
    known = sorted({sample.split for sample in samples if sample.split is not None})
    for name in wanted:
        if name not in known:
            there = ", ".join(known) or "none"
            raise DataError(f"{where}: split '{name}' is not there{did_you_mean(name, known)}; splits: {there}")
    return [sample for sample in samples if sample.split in wanted]


def in_validation(picture: str, fraction: float, seed: int) -> bool:
    """Say whether a picture belongs to the validation part: SHA-256 of seed and name, read as a number from 0 to 1."""
    digest = hashlib.sha256(f"{seed}:{picture}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def hold_out(samples: Iterable[Sample], holdout: Holdout, root: Path) -> list[Sample]:
    """Return one part of a split by picture, with `split` set to its name.

    A sample whose pictures fall on both sides belongs to neither part, so that no picture is ever in both.
    """
    kept, mixed = [], 0
    for sample in samples:
        sides = {in_validation(_name(image, root), holdout.fraction, holdout.seed) for image in sample.images}
        if len(sides) > 1:
            mixed += 1
        elif sides == {holdout.part == "val"}:
            kept.append(replace(sample, split=holdout.part))
    if mixed:
        log.warning("holdout: %d samples show pictures of both parts and are in neither", mixed)
    return kept


def first_pictures(samples: list[Sample], limit: int | None) -> list[Sample]:
    """Keep all samples of the first `limit` pictures (or sets of pictures), in the order in which these appear."""
    if limit is None:
        return samples
    wanted: dict[tuple[Path, ...], None] = {}
    for sample in samples:
        wanted[sample.images] = None
        if len(wanted) == limit:
            break
    return [sample for sample in samples if sample.images in wanted]


def check_pictures_exist(samples: list[Sample], *, where: str) -> None:
    """Raise `DataError` when there is no sample, or when not one picture file exists: the path is wrong then."""
    if not samples:
        raise DataError(f"{where}: got 0 samples, expected at least one; check split, holdout and limit")
    if not any(image.exists() for sample in samples for image in sample.images):
        pictures = len({image for sample in samples for image in sample.images})
        raise DataError(
            f"{where}: none of its {pictures} pictures exists, first looked for {samples[0].images[0]}; "
            "check the source's `path` and where its pictures are"
        )


def _name(image: Path, root: Path) -> str:
    return image.relative_to(root).as_posix() if image.is_relative_to(root) else image.name
