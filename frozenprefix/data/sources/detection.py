"""The sources of a folder, detected by its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from frozenprefix.assets import resolve
from frozenprefix.data.images import image_ending, walk_files
from frozenprefix.data.sources.csv_table import fit_table
from frozenprefix.data.sources.image_names import ImageNames
from frozenprefix.data.sources.selection import split_in_name
from frozenprefix.data.sources.spreadsheets import is_table
from frozenprefix.errors import DataError

Fields = dict[str, Any]
_TABLES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".tar", ".zip", ".xlsx")


def _coco(root: Path, file: Path) -> Fields:
    year = file.stem.removeprefix("captions_")
    return {"type": "coco", "annotations": file.relative_to(root).as_posix(), "images": _image_folder(root, year)}


def _karpathy(root: Path, file: Path) -> Fields:
    return {"type": "karpathy", "file": file.name, "images": _image_folder(root, ".")}


def _flickr(root: Path, file: Path) -> Fields:
    split_files = {}
    for listed in sorted(root.glob("*.*Images.txt")):
        name = listed.stem.rpartition(".")[2].removesuffix("Images")
        split_files[{"dev": "val"}.get(name, name)] = listed.name
    return {
        "type": "flickr_tokens",
        "tokens": file.name,
        "images": _image_folder(root, "."),
        "split_files": split_files,
    }


def _vqa_v2(root: Path, file: Path) -> Fields:
    subtype = file.stem.removesuffix("_questions").rpartition("_")[2]
    annotations = file.name.replace("OpenEnded_", "").replace("_questions", "_annotations")
    return {
        "type": "vqa_v2",
        "questions": file.name,
        "annotations": annotations if (root / annotations).is_file() else None,
        "images": _image_folder(root, subtype),
    }


#: File, or pattern of files, that marks a folder → the source that reads it.
MARKS: dict[str, Fields | Callable[[Path, Path], Fields]] = {
    "captions.jsonl": {"type": "captions"},
    "qa.jsonl": {"type": "qa"},
    "qa.json": {"type": "qa"},
    "train/questions.json": {"type": "easy_vqa"},
    "questions/CLEVR_*_questions.json": {"type": "clevr"},
    "*_balanced_questions.json": {"type": "gqa"},
    "Annotations/train.json": {"type": "vizwiz"},
    "Annotations/val.json": {"type": "vizwiz"},
    "refs.json": {"type": "refcoco"},
    "region_descriptions.json": {"type": "visual_genome", "questions": None},
    "question_answers.json": {"type": "visual_genome", "regions": None},
    "qa.894.raw.*.txt": {"type": "daquar"},
    "dataset_dict.json": {"type": "hf_dataset"},
    "state.json": {"type": "hf_dataset"},
    "*-of-*.parquet": {"type": "hf_dataset"},
    "data/*-of-*.parquet": {"type": "hf_dataset"},
    # tars with a number, so that an archive of images in the same folder does not count
    "0*.tar": {"type": "webdataset"},
    "*-0*.tar": {"type": "webdataset"},
    "train/*0.tar": {"type": "webdataset"},
    "captions_*.json": _coco,
    "annotations/captions_*.json": _coco,
    "dataset_coco.json": _karpathy,
    "dataset_flickr*.json": _karpathy,
    "v2_OpenEnded_mscoco_*_questions.json": _vqa_v2,
    "*.token.txt": _flickr,
    "results_*.token": _flickr,
    "captions.txt": _flickr,
    "results.csv": _flickr,
}


def detect_sources(path: str | Path, split: str | None = None) -> list[Fields]:
    """Source configs for a folder, or a reference to one: by the files in it, else as a folder of images.

    Args:
        split: leave out files that are another split by their names, such as captions_train2017.json for "val".

    Raises:
        DataError: for something else than a folder.

    Example:
        >>> [source["type"] for source in detect_sources(data_folder)]
        ['captions', 'qa']
    """
    root = resolve(str(path))
    if not root.is_dir():
        raise DataError(f"data folder: got '{path}', expected a folder that exists")
    sources = known_sources(root, split) or _tables_by_content(root) or [{"type": "image_folder"}]
    several = len({fields["type"] for fields in sources}) > 1
    return [{"path": str(path), "name": fields["type"] if several else None, **fields} for fields in sources]


def known_sources(root: Path, split: str | None = None) -> list[Fields]:
    """Sources of the files of known data sets in a folder, without its path; no spreadsheet is looked into.

    Args:
        split: as of `detect_sources`.

    Example:
        >>> known_sources(images_folder)
        []
    """
    sources: list[Fields] = []
    for mark, source in MARKS.items():
        for file in sorted(root.glob(mark)):
            if callable(source):
                fields = source(root, file)
                if split is not None and split_in_name(file.name) not in (None, split):
                    continue
            else:
                fields = source
            if fields not in sources:
                sources.append(fields)
    return sources or _coco_by_content(root, split)


def unread_tables(path: str | Path) -> list[Path]:
    """Tables and archives in a folder that is read as a folder of images: texts may be in them that nothing reads.

    Example:
        >>> unread_tables(images_folder)
        []
    """
    if [source["type"] for source in detect_sources(path)] != ["image_folder"]:
        return []
    return [file for file in walk_files(resolve(str(path))) if file.suffix.lower() in _TABLES]


def _coco_by_content(root: Path, split: str | None) -> list[Fields]:
    """Files of COCO's form under names of their own, such as captions.json or valid/_annotations.coco.json."""
    sources: list[Fields] = []
    for file in [*sorted(root.glob("*.json")), *sorted(root.glob("*/*.json"))]:
        if split is not None and split_in_name(file.name) not in (None, split):
            continue
        try:
            content = json.loads(file.read_bytes())
            name, _ = content["images"][0]["file_name"], content["annotations"][0]["caption"]
            places = [file.parent, root / "images", root, *sorted(entry for entry in root.iterdir() if entry.is_dir())]
            images = next((place for place in places if (place / name).is_file()), root / "images")
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            continue
        place = images.relative_to(root).as_posix()
        sources.append({"type": "coco", "annotations": file.relative_to(root).as_posix(), "images": place})
    return sources


def _tables_by_content(root: Path) -> list[Fields]:
    """The spreadsheet in a folder whose rows name most of the images in it, if they name at least half of them."""
    files = [file for file in sorted(root.iterdir()) if is_table(file) and file.is_file()]
    if not files:
        return []
    fits, names = [], ImageNames(root)
    for file in files if names.files else ():
        try:
            fits.append(fit_table({"type": "csv", "path": str(root), "file": file.name}, names, file))
        except DataError:
            continue  # no table of images; `unread_tables` names it
    best = max(fits, key=lambda fit: fit.found, default=None)
    if best is None or best.found < len(names.files) / 2:
        return []
    return [{key: value for key, value in best.config.items() if key != "path"}]


def _image_folder(root: Path, name: str) -> str:
    """The folder of the images: `name`, where an image is in it or in a folder of that name below `images`."""
    places = [
        f"images/{name}".removesuffix("/."),
        name,
        "images",
        "Images",
        "flickr30k_images",
        "Flicker8k_Dataset",
        ".",
    ]
    for place in places:
        folder = root / place
        if folder.is_dir() and any(image_ending(path.name) for path in folder.iterdir()):
            return place
    return name
