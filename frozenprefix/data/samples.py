"""One training or evaluation example, whatever file format it came from."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from frozenprefix.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sample:
    """Images, what is asked about them, and what is to be learned.

    Args:
        id: unique within a list of samples.
        images: image files, in the order in which the prompt names them.
        targets: texts to learn, each on its own; empty where only a prediction is wanted.
        prompt: prompt template; None takes the task's default one.
        question: what is asked, for task "vqa".
        history: of a chat, the (question, answer) turns before; the chat template writes them and the question, in
            place of `prompt`. Marks in any question, or none, as in a prompt. None: no chat.
        split: "train", "val", "test", or whatever name the source gives.
        task: "caption", "vqa", or "classification", whose one target is the label.
        metadata: what the source knows beyond that. For "vqa", `answers` holds every human answer.
    """

    id: str
    images: tuple[Path, ...]
    targets: tuple[str, ...]
    prompt: str | None = None
    question: str | None = None
    history: tuple[tuple[str, str], ...] | None = None
    split: str | None = None
    task: str = "caption"
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class ImageGroup:
    """The samples that show exactly the same images in the same order."""

    images: tuple[Path, ...]
    samples: tuple[Sample, ...]


def group_by_images(samples: Iterable[Sample]) -> list[ImageGroup]:
    """Group samples by their images. Groups, and samples within one, keep the order in which they are first seen."""
    groups: dict[tuple[Path, ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.images, []).append(sample)
    return [ImageGroup(images, tuple(members)) for images, members in groups.items()]


def drop_empty_targets(samples: Iterable[Sample], *, where: str) -> list[Sample]:
    """The samples without their empty targets; samples that have no other target are left out. The log counts both.

    Args:
        where: what the samples are, for the log and the error: "data.train".

    Raises:
        DataError: when no target is left.

    Example:
        >>> rows = [Sample("1", (), ("a dog", " ")), Sample("2", (), ())]
        >>> [(sample.id, sample.targets) for sample in drop_empty_targets(rows, where="data.train")]
        [('1', ('a dog',))]
    """
    samples = list(samples)
    kept = [replace(sample, targets=tuple(text for text in sample.targets if text.strip())) for sample in samples]
    empty = sum(len(sample.targets) for sample in samples) - sum(len(sample.targets) for sample in kept)
    left = [sample for sample in kept if sample.targets]
    if empty or len(left) < len(samples):
        missing = len(samples) - len(left)
        log.warning(
            "%s: %d empty targets, and %d of %d samples without a target, are left out",
            where, empty, missing, len(samples),
        )  # fmt: skip
    if not left:
        raise DataError(f"{where}: got {len(samples)} samples and not one target text, expected at least one")
    return left


def swap_images(shown: Sequence[tuple[Path, ...]]) -> dict[tuple[Path, ...], tuple[Path, ...]]:
    """For each tuple of images as many others, none of them its own: what a sample is shown when it is shuffled.

    That is the next tuple with as many images, from half of these on, that shares none with it; where there is none,
    the images of the others, one after the other.

    Raises:
        DataError: when a tuple has all images that there are.
    """
    alike: dict[int, list[tuple[Path, ...]]] = {}
    for images in dict.fromkeys(shown):
        alike.setdefault(len(images), []).append(images)
    swapped = {}
    for same in alike.values():
        for place, images in enumerate(same):
            own, start = set(images), place + len(same) // 2
            later = (same[(start + step) % len(same)] for step in range(len(same)))
            found = next((others for others in later if own.isdisjoint(others)), None)
            swapped[images] = found or _foreign(shown, images)
    return swapped


def _foreign(shown: Sequence[tuple[Path, ...]], own: tuple[Path, ...]) -> tuple[Path, ...]:
    others = dict.fromkeys(path for images in shown for path in images if path not in own)
    if not others:
        raise DataError(
            f"shuffled images need at least 2 different images, and here are only those of one sample: {own[0]}"
        )
    return tuple(islice(cycle(others), len(own)))


def check_unique_ids(samples: Iterable[Sample]) -> None:
    """Raise `DataError` when two samples share an id: predictions are matched to references by it."""
    seen: set[str] = set()
    repeated: dict[str, None] = {}
    for sample in samples:
        if sample.id in seen:
            repeated[sample.id] = None
        seen.add(sample.id)
    if repeated:
        shown = ", ".join(repr(name) for name in list(repeated)[:3])
        raise DataError(
            f"sample id: {len(repeated)} ids occur more than once ({shown}), expected unique ids; "
            "give joined sources different `name`s"
        )
