"""One training or evaluation example, independent of its file format."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from frozenprefix.errors import DataError
from frozenprefix.utils import content_hash, file_sha256, replace_surrogates, report, report_left_out


@dataclass(frozen=True, slots=True)
class Sample:
    """Images with a prompt or question, and the targets to learn.

    Args:
        id: unique within a list of samples.
        images: image files, in the order in which the prompt names them; none for a conversation in text alone.
        targets: texts to learn, each on its own; empty where only a prediction is wanted.
        prompt: prompt template; None takes the task's default one.
        question: for task "vqa".
        history: of a chat, the (question, answer) turns before; the chat template writes them and the question, in
            place of `prompt`. Marks in any question, or none, as in a prompt. None: no chat.
        split: "train", "val", "test", or whatever name the source gives.
        task: "caption", "vqa", or "classification", whose one target is the label.
        metadata: further fields of the source. For "vqa", `answers` holds every human answer.
        where: file and line that the sample was read from, for messages.

    Example:
        >>> Sample("1", (Path("1.jpg"),), ("a dog",)).task
        'caption'
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
    where: str = field(default="", compare=False)

    @property
    def group(self) -> tuple[Path | str, ...]:
        """Key to group samples by: their images or, without images, the conversation that the sample is a turn of.

        Example:
            >>> Sample("chat.0", (), ("yes",)).group, Sample("1", (Path("1.jpg"),), ()).group == (Path("1.jpg"),)
            (('chat',), True)
        """
        return self.images or (self.id.rpartition(".")[0] or self.id,)

    @property
    def label(self) -> str:
        """Name of the sample in messages: its id, and where it was read."""
        return f"sample '{self.id}'" + (f" ({self.where})" if self.where else "")


@dataclass(frozen=True, slots=True)
class ImageGroup:
    """The samples that show exactly the same images in the same order.

    Example:
        >>> ImageGroup((Path("1.jpg"),), ()).images[0].name
        '1.jpg'
    """

    images: tuple[Path, ...]
    samples: tuple[Sample, ...]

    @property
    def key(self) -> str:
        """The paths of the images, one a line."""
        return "\n".join(map(str, self.images))


def with_one_name_per_image(samples: Sequence[Sample], *, where: str) -> list[Sample]:
    """The samples with one path for each image file, the first one seen: an image is told by its path.

    A file has other names by links, by `..` in a path, in folders that are given twice, and on file systems that do not
    tell small letters from capitals. The names that give way are counted in the log.

    Example:
        >>> (tmp_path / "link.png").symlink_to(image_path)
        >>> samples = [Sample("1", (image_path,), ()), Sample("2", (tmp_path / "link.png",), ())]
        >>> [sample.images == (image_path,) for sample in with_one_name_per_image(samples, where="data")]
        [True, True]
    """
    names: dict[tuple[int, int] | Path, Path] = {}
    chosen: dict[Path, Path] = {}
    for path in dict.fromkeys(image for sample in samples for image in sample.images):
        try:
            state = path.stat()
        except (OSError, ValueError):  # a missing file, or no name of a file
            chosen[path] = path
        else:
            chosen[path] = names.setdefault((state.st_dev, state.st_ino) if state.st_ino else path, path)
    others = [path for path, name in chosen.items() if path != name]
    report(
        where, len(chosen), {"other name of the same file": len(others)}, done="joined", what="images", examples=others
    )
    if not others:
        return list(samples)
    renamed = [tuple(chosen[image] for image in sample.images) for sample in samples]
    return [
        sample if sample.images == images else replace(sample, images=images)
        for sample, images in zip(samples, renamed, strict=True)
    ]


def group_by_images(samples: Iterable[Sample]) -> list[ImageGroup]:
    """Group samples by their images. Groups, and samples within one, keep the order in which they are first seen.

    Example:
        >>> one, two = Sample("1", (Path("1.jpg"),), ()), Sample("2", (Path("1.jpg"),), ())
        >>> [[sample.id for sample in group.samples] for group in group_by_images([one, two])]
        [['1', '2']]
    """
    groups: dict[tuple[Path | str, ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    return [ImageGroup(members[0].images, tuple(members)) for members in groups.values()]


def with_images(samples: Sequence[Sample], *, where: str) -> list[Sample]:
    """The samples that show an image; the others are counted in the log.

    Args:
        where: names the samples in messages: "data.validation".

    Raises:
        DataError: no sample shows an image.

    Example:
        >>> samples = [Sample("1", (Path("1.jpg"),), ()), Sample("2", (), ())]
        >>> [sample.id for sample in with_images(samples, where="data")]
        ['1']
    """
    samples_with_images = [sample for sample in samples if sample.images]
    report_left_out(where, len(samples), {"no image": len(samples) - len(samples_with_images)}, what="samples")
    return samples_with_images


def with_targets(samples: Iterable[Sample], *, where: str) -> list[Sample]:
    """The samples that have a target that is not blank, without their blank ones. The rest is counted in the log.

    Training, validation and evaluation all read samples through this.

    Args:
        where: names the samples in messages: "data.train".

    Raises:
        DataError: no sample has a target.

    Example:
        >>> samples = [Sample("1", (), ("a dog", " ")), Sample("2", (), ())]
        >>> [(sample.id, sample.targets) for sample in with_targets(samples, where="data.train")]
        [('1', ('a dog',))]
    """
    complete, without, total, blank = [], 0, 0, 0
    for sample in samples:
        total += 1
        targets = tuple(text for text in sample.targets if text.strip())
        if not targets:
            without += 1
            continue
        blank += len(sample.targets) - len(targets)
        complete.append(sample if len(targets) == len(sample.targets) else replace(sample, targets=targets))
    report_left_out(where, total, {"no target": without}, what="samples", fix="check where the texts are")
    if blank:
        report_left_out(
            where, sum(len(sample.targets) for sample in complete) + blank, {"blank": blank}, what="targets"
        )
    return complete


def digest_samples(samples: Sequence[Sample], image_key: Callable[[Path], str] | None = None) -> dict[str, str | int]:
    """Digest of the samples that a run depends on: their number, and hashes of their ids, images and texts.

    Args:
        image_key: image file → text that changes with its content; default: its SHA-256.

    Example:
        >>> sorted(digest_samples([Sample("1", (Path("1.jpg"),), ("a dog",))]))
        ['ids', 'images', 'number', 'prompts', 'targets']
    """
    key = image_key or _content_of
    keys = {path: key(path) for path in dict.fromkeys(path for sample in samples for path in sample.images)}
    columns = {
        "ids": [sample.id for sample in samples],
        "images": [repr([keys[path] for path in sample.images]) for sample in samples],
        "prompts": [repr((sample.prompt, sample.question, sample.history)) for sample in samples],
        "targets": [repr(sample.targets) for sample in samples],
    }
    hashes = {name: content_hash(*texts)[:16] for name, texts in columns.items()}
    return {"number": len(samples), **hashes}


def _content_of(path: Path) -> str:
    return file_sha256(path) if os.path.isfile(path) else f"{path.name} missing"


def with_valid_text(samples: Iterable[Sample], *, where: str) -> list[Sample]:
    """The samples with lone surrogates in their texts replaced, and counted in the log.

    Example:
        >>> with_valid_text([Sample("1", (), ("a \\ud83d dog",))], where="data")[0].targets == ("a \\ufffd dog",)
        True
    """
    valid, replaced = [], 0
    for sample in samples:
        sample, changed = valid_text(sample)
        replaced += changed
        valid.append(sample)
    report(where, len(valid), {"lone surrogates replaced": replaced}, done="changed", what="samples")
    return valid


def valid_text(sample: Sample) -> tuple[Sample, bool]:
    """A sample without lone surrogates in its texts, and whether it had any.

    Example:
        >>> valid_text(Sample("1", (), ("a dog",)))[1]
        False
    """
    answers = sample.metadata.get("answers", ())
    before = (sample.targets, sample.question, sample.prompt, sample.history, answers)
    after = _valid(before)
    if after == before:
        return sample, False
    targets, question, prompt, history, answers = after
    metadata = sample.metadata | ({"answers": answers} if answers else {})
    changes = {"targets": targets, "question": question, "prompt": prompt, "history": history}
    return replace(sample, metadata=metadata, **changes), True


def _valid(value: Any) -> Any:
    """Texts, or nested tuples of texts, without lone surrogates."""
    if isinstance(value, str):
        return replace_surrogates(value)
    return tuple(map(_valid, value)) if isinstance(value, tuple) else value


def swap_images(image_sets: Sequence[tuple[Path, ...]]) -> dict[tuple[Path, ...], tuple[Path, ...]]:
    """For each tuple of images, as many other images, for evaluation with shuffled images.

    This is the next tuple of the same length, counted from half of the list on, that shares no image with it; if there
    is none, images of the other tuples in order.

    Raises:
        DataError: when a tuple has all images that there are.

    Example:
        >>> one, two = (Path("1.jpg"),), (Path("2.jpg"),)
        >>> swap_images([one, two]) == {one: two, two: one}
        True
    """
    by_size: dict[int, list[tuple[Path, ...]]] = {}
    for images in dict.fromkeys(image_sets):
        by_size.setdefault(len(images), []).append(images)
    swapped = {}
    for alike in by_size.values():
        for place, images in enumerate(alike):
            own, start = set(images), place + len(alike) // 2
            later = (alike[(start + step) % len(alike)] for step in range(len(alike)))
            disjoint = next((others for others in later if own.isdisjoint(others)), None)
            swapped[images] = disjoint or _other_images(image_sets, images)
    return swapped


def _other_images(image_sets: Sequence[tuple[Path, ...]], own: tuple[Path, ...]) -> tuple[Path, ...]:
    others = dict.fromkeys(path for images in image_sets for path in images if path not in own)
    if not others:
        raise DataError(
            f"shuffled images need at least 2 different images, and here are only those of one sample: {own[0]}"
        )
    return tuple(islice(cycle(others), len(own)))


def check_unique_ids(samples: Iterable[Sample]) -> None:
    """Raise `DataError` when two samples share an id: predictions are matched to references by it.

    Example:
        >>> check_unique_ids([Sample("1", (), ()), Sample("1", (), ())])
        Traceback (most recent call last):
        frozenprefix.errors.DataError: sample id: 1 ids occur more than once ('1'), expected unique ids; ...
    """
    seen: dict[str, Sample] = {}
    repeated: dict[str, str] = {}
    for sample in samples:
        other = seen.get(sample.id)
        seen.setdefault(sample.id, sample)
        if other is not None and sample.id not in repeated:
            places = " and ".join(dict.fromkeys(place for place in (other.where, sample.where) if place))
            repeated[sample.id] = f"{sample.id!r}" + (f" in {places}" if places else "")
    if repeated:
        examples = ", ".join(list(repeated.values())[:3])
        raise DataError(
            f"sample id: {len(repeated)} ids occur more than once ({examples}), expected unique ids; "
            "give joined sources different `name`s"
        )
