"""What a folder of images holds to learn from: a table, text files beside the images, or folders that are labels."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

from frozenprefix.data.images import image_ending, load_image, walk_files
from frozenprefix.data.samples import Sample
from frozenprefix.data.sources import Holdout, load_source
from frozenprefix.data.sources.csv_table import FittedTable, fit_table
from frozenprefix.data.sources.detection import known_sources
from frozenprefix.data.sources.image_folder import text_file_beside
from frozenprefix.data.sources.image_names import ImageNames, has_versions
from frozenprefix.data.sources.selection import hold_out
from frozenprefix.data.sources.spreadsheets import TABLE_ENDINGS, is_table
from frozenprefix.errors import BadImageError, DataError, shorten

TextsFrom = Literal["auto", "table", "files", "folders"]
_TRAIN, _VALIDATION = ("train", "training"), ("val", "valid", "validation", "dev")
_TESTS = ("test", "testing", "eval")
_NO_LABELS = frozenset({"images", "image", "photos", "photo", "img", "imgs", "data", *_TRAIN, *_VALIDATION, *_TESTS})
_TEXT = ".txt"
_SECONDS_OF_READING = 10.0
_SEEDS = 200
_MOST_FOR_SEEDS = 2000
_EXAMPLES = 4
FEW_IMAGES = 100


@dataclass
class Survey:
    """What a folder has to learn from, and how to read it.

    Attributes:
        train, validation: sources of a recipe; no validation where there are too few images.
        train_images, validation_images: images that are there and have texts.
        targets: texts of an image, on average; words: of the longest text.
        examples: a few texts of usual length, of different images to train on.
        missing: images that texts name and that are not there, or cannot be read.
        found: lines that say what was found; notes: what may be wrong.

    Example:
        >>> survey(data_folder).task
        'caption'
    """

    folder: Path
    task: str = "caption"
    train: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    train_images: int = 0
    validation_images: int = 0
    targets: float = 1.0
    words: int = 1
    missing: int = 0
    examples: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def survey(
    folder: Path,
    *,
    texts_from: TextsFrom = "auto",
    table: Path | None = None,
    columns: dict[str, Any] | None = None,
    validation: float | None = None,
) -> Survey:
    """Look at a folder of images with their texts.

    Args:
        texts_from: where texts are; "auto" takes the first there is of a known data set's files, a table, text files
            beside the images, and folders that are labels.
        table: the table, if it is known.
        columns: fields of the source `csv` that are known, such as `image` and `captions`.
        validation: share of the images for validation; by their number when None. Not used where the data have splits.

    Raises:
        DataError: the folder has no images, or no texts; a table is damaged.

    Example:
        >>> survey(data_folder).train[0]["type"]
        'captions'
    """
    folder = Path(os.path.abspath(folder.expanduser()))  # a recipe may be used from any folder
    names = ImageNames(folder)
    if not names.files:
        raise DataError(f"{folder}: has no image; expected a folder of photos with a table of their texts")
    result = Survey(folder)
    columns = {key: value for key, value in (columns or {}).items() if value is not None}
    found = _known(result) if texts_from == "auto" and table is None and not columns else None
    if found is None:
        config = _config(result, names, texts_from, table, columns)
        found = config, load_source(config)
    config, samples = found
    result.task = samples[0].task
    missing = _count_missing(result, samples, names)
    usable = [s for s in samples if any(text.strip() for text in s.targets) and missing.isdisjoint(s.images)]
    if not usable:
        raise DataError(f"{folder}: no image that is there has a text; {'; '.join(result.notes) or 'check the table'}")
    texts = [text for sample in usable for text in sample.targets]
    images = {sample.images for sample in usable}
    result.targets, result.words = len(texts) / len(images), max(len(text.split()) for text in texts)
    result.found.append(f"{len(images)} images with {len(texts)} {_WHAT[result.task]}, e.g. {shorten(texts[0], 70)}")
    _divide(result, config, usable, validation)
    return result


_WHAT = {"caption": "captions", "vqa": "questions and answers", "classification": "labels"}


# ── where the texts are ──


def _config(
    result: Survey, names: ImageNames, texts_from: TextsFrom, table: Path | None, columns: dict[str, Any]
) -> dict[str, Any]:
    folder = result.folder
    asked = table is not None or bool(columns)
    if asked or texts_from in ("auto", "table"):
        config = _table(result, names, table, columns)
        if config is not None:
            return config
        if texts_from == "table":
            raise DataError(f"{folder}: has no table ({', '.join(TABLE_ENDINGS)}); name it with --table")
    beside = [path for path in names.files if text_file_beside(path, _TEXT)]
    if texts_from == "files" or (texts_from == "auto" and len(beside) >= len(names.files) / 2):
        result.found.append(f"text files beside {len(beside)} of {len(names.files)} images: a line is a caption")
        return {"type": "image_folder", "path": str(folder), "texts": _TEXT}
    if config := _labels(result, names, force=texts_from == "folders"):
        return config
    raise DataError(
        f"{folder}: has {len(names.files)} images and no texts to learn; expected a table with a row for each image "
        "(CSV or Excel, columns such as image and caption), a .txt beside each image, or a folder for each label"
    )


def _known(result: Survey) -> tuple[dict[str, Any], list[Sample]] | None:
    """The files of a known data set and their samples, if they can be read as such."""
    known = known_sources(result.folder)
    if not known:
        return None
    config = {**known[0], "path": str(result.folder)}  # a null says that a file is not to be read
    try:
        samples = load_source(config)
    except DataError as error:  # perhaps a table of that name, with other columns
        result.notes.append(f"its files look like the kind '{config['type']}' and are not read as such: {error}")
        return None
    if len(known) > 1:
        result.notes.append(f"the folder has {len(known)} kinds of texts; this is the first of them")
    result.found.append(f"files of the kind '{config['type']}'")
    return config, samples


def _table(result: Survey, names: ImageNames, table: Path | None, columns: dict[str, Any]) -> dict[str, Any] | None:
    folder = result.folder
    files = [table] if table else list(filter(is_table, walk_files(folder)))
    fits: list[FittedTable] = []
    problem: DataError | None = None
    for file in files:
        place = {"path": str(folder), "file": str(file.resolve())}
        if file.resolve().is_relative_to(folder.resolve()):
            place["file"] = file.resolve().relative_to(folder.resolve()).as_posix()
        try:
            fits.append(fit_table({"type": "csv", **place, **columns}, names, file))
        except DataError as error:
            problem = problem or error
    if not fits:
        if problem is not None:
            raise problem
        return None
    fits.sort(key=lambda fit: -fit.found)
    result.found += fits[0].lines
    if len(fits) > 1:
        others = ", ".join(str(fit.config["file"]) for fit in fits[1:4])
        result.notes.append(f"there are other tables, which are not read ({others}); --table FILE takes one of them")
    return fits[0].config


def _labels(result: Survey, names: ImageNames, *, force: bool) -> dict[str, Any] | None:
    """Folders that are labels, with splits above them or without."""
    parts = [path.relative_to(result.folder).parts[:-1] for path in names.files]
    splits = {part[0].lower() for part in parts if part}
    split_folders = all(len(part) > 1 for part in parts) and splits <= {*_TRAIN, *_VALIDATION, *_TESTS}
    labels = Counter(part[-1] for part in parts if part)
    generic = [label for label in labels if label.lower() in _NO_LABELS]
    if not all(parts) or len(labels) < 2 or (not force and (generic or mean(labels.values()) < 2)):
        return None
    listed = ", ".join(f"{label} ({count})" for label, count in labels.most_common(5))
    result.found.append(f"{len(labels)} folders that are labels: {listed}{', …' if len(labels) > 5 else ''}")
    config: dict[str, Any] = {"type": "image_folder", "path": str(result.folder), "labels": True}
    return {**config, "split_folders": True} if split_folders else config


# ── what may be wrong ──


def _count_missing(result: Survey, samples: Sequence[Sample], names: ImageNames) -> Set[Path]:
    """Note what may be wrong with the images; return those that are named and not there."""
    missing = {image: s for s in samples for image in s.images if not image.is_file()}
    if missing:
        first, sample = next(iter(missing.items()))
        place = f" ({sample.where})" if sample.where else ""
        result.notes.append(f"{len(missing)} images are named and not there, the first is {first.name}{place}")
    with_text = {image for sample in samples for image in sample.images if any(t.strip() for t in sample.targets)}
    without = [path for path in names.files if path not in with_text]
    if without and result.task == "caption":
        listed = ", ".join(path.name for path in without[:3])
        result.notes.append(f"{len(without)} images have no text ({listed}{', …' if len(without) > 3 else ''})")
    bad: list[str] = []
    started = time.monotonic()
    for image in [image for image in with_text if image_ending(image.name) and image not in missing]:
        if time.monotonic() - started > _SECONDS_OF_READING:
            break
        try:
            load_image(image)
        except BadImageError as error:
            bad.append(str(error))
    if bad:
        result.notes.append(f"{len(bad)} images cannot be read, the first: {bad[0]}")
    result.missing = len(missing) + len(bad)
    return missing.keys()


# ── training and validation ──


def _divide(result: Survey, config: dict[str, Any], samples: list[Sample], share: float | None) -> None:
    """Fill in the two parts: by the splits of the data, or by image."""
    splits = Counter(sample.split for sample in samples if sample.split is not None)
    train = [name for name in splits if name.lower() in _TRAIN]
    val = [name for name in splits if name.lower() in _VALIDATION]
    if train and val:
        _fill(result, config, samples, {"split": _one(train)}, {"split": _one(val)})
        result.found.append(f"splits of the data: {', '.join(f'{name} {count}' for name, count in splits.items())}")
        return
    if train and len(splits) > 1:
        config = {**config, "split": _one(train)}
        samples = [sample for sample in samples if sample.split in train]
        result.notes.append(f"the data have no split for validation; a part of '{train[0]}' is taken for it")
    images = list(dict.fromkeys(image for sample in samples for image in sample.images))
    if len(images) < 4:
        result.train, result.train_images = [config], len(images)
        result.notes.append(f"{len(images)} images are too few for a validation; expected at least 20 to learn from")
        return
    holdout = _holdout(samples, images, Path(config["path"]), share)
    _fill(result, config, samples, {"holdout": {"part": "train", **holdout}}, {"holdout": {"part": "val", **holdout}})
    result.found.append(
        f"{result.train_images} images to train on, {result.validation_images} for validation, chosen by their names"
    )
    if result.train_images < FEW_IMAGES:
        result.notes.append(
            f"{result.train_images} images are few: many captions will repeat one that was learned; hundreds do better"
        )


def _one(names: list[str]) -> str | list[str]:
    return names[0] if len(names) == 1 else names


def _fill(
    result: Survey, config: dict[str, Any], samples: list[Sample], train: dict[str, Any], val: dict[str, Any]
) -> None:
    for part, fields in (("train", train), ("validation", val)):
        if "holdout" in fields:
            members = hold_out(samples, Holdout(**fields["holdout"]), Path(config["path"]))
        else:
            wanted = [fields["split"]] if isinstance(fields["split"], str) else fields["split"]
            members = [sample for sample in samples if sample.split in wanted]
        if part == "train":
            result.examples = _examples(members)
        setattr(result, part, [{**config, **fields}])
        setattr(result, f"{part}_images", len({sample.images for sample in members}))


def _examples(samples: list[Sample]) -> list[str]:
    """One text of each of a few images, those of the usual length; none with marks that prompts give a meaning."""
    firsts = {sample.images: " ".join(sample.targets[0].split()) for sample in samples if sample.targets}
    texts = [text for text in dict.fromkeys(firsts.values()) if text and not set(text) & set("{}<>")]
    usual = median(len(text.split()) for text in texts) if texts else 0
    return sorted(texts, key=lambda text: abs(len(text.split()) - usual))[:_EXAMPLES]


def _holdout(samples: list[Sample], images: list[Path], root: Path, share: float | None) -> dict[str, Any]:
    """Options of a division by image with about the wanted number of images for validation: at least two."""
    together = has_versions(str(image) for image in images)
    options: dict[str, Any] = {"versions": "together"} if together else {}
    if share is None:
        share = 0.2 if len(images) <= 100 else min(0.1, round(500 / len(images), 4))
    wanted = max(2, round(share * len(images)))
    fraction = round(wanted / len(images), 4)

    def distance(seed: int) -> int:
        part = Holdout(part="val", fraction=fraction, seed=seed, **options)
        return abs(len({sample.images for sample in hold_out(samples, part, root)}) - wanted)

    seeds = range(_SEEDS) if len(images) <= _MOST_FOR_SEEDS else range(1)
    exact = next((seed for seed in seeds if distance(seed) == 0), None)
    best = min(seeds, key=distance) if exact is None else exact
    return {"fraction": fraction, "seed": best, **options}
