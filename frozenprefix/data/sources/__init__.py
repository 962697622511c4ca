"""Data sources: each reads one file format into a list of samples.

    load_source({"type": "captions", "path": "data/flickr8k", "split": "train"})

| type | reads |
|---|---|
| captions | `captions.jsonl`: an image, or the frames of a clip, a line, with its captions or its label |
| qa | `qa.jsonl` or `qa.json`: a question a row, with its answers |
| csv | a CSV, TSV, Excel or JSON table of any columns, beside a folder of images |
| image_folder | images, with their folders' names as labels, or a text file beside each |
| coco | COCO's caption files, and VizWiz-Captions' |
| karpathy | Karpathy's splits of COCO, Flickr8k and Flickr30k |
| flickr_tokens | Flickr8k's and Flickr30k's token files, Kaggle's captions.txt, results.csv |
| conceptual_captions | tables of captions and addresses, with downloaded images: CC3M, CC12M |
| visual_genome | region descriptions as captions; questions and answers |
| vqa_v2 | VQAv2's question and annotation files, and OK-VQA's |
| vizwiz, gqa, clevr, daquar | these data sets' own files |
| refcoco | RefCOCO's phrases and boxes: where something is |
| llava | conversations of several turns about an image |
| hf_dataset | `datasets`' saved folders, parquet and arrow files |
| webdataset | tars of images and texts, such as img2dataset's |
| objects | what `source_from` makes of lists and data sets in memory |
| easy_vqa | drawings of coloured shapes, from PyPI |

A new source is a subclass of `SourceConfig` with `type`, its own fields and `read`, added to `SOURCES` under its type;
one from outside this package is registered by `@register_source("name")`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from frozenprefix.assets import resolve
from frozenprefix.data.samples import Sample, check_unique_ids, with_one_name_per_image, with_valid_text
from frozenprefix.data.sources.base import Holdout, SourceConfig, StreamedSource
from frozenprefix.data.sources.detection import detect_sources, unread_tables
from frozenprefix.data.sources.selection import check_images_exist, first_images, hold_out, of_split
from frozenprefix.data.streaming.groups import StreamedGroups
from frozenprefix.data.streaming.remote import is_address
from frozenprefix.errors import ConfigError, DataError, did_you_mean
from frozenprefix.registry import Registry

__all__ = [
    "SOURCES",
    "Holdout",
    "SourceConfig",
    "StreamedSource",
    "detect_sources",
    "load_source",
    "load_sources",
    "open_source",
    "parse_source",
    "register_source",
    "unread_tables",
]

log = logging.getLogger(__name__)

_HERE = "frozenprefix.data.sources"
SOURCES: Registry[type[SourceConfig]] = Registry(
    "data source",
    {
        "captions": f"{_HERE}.captions:CaptionsSource",
        "clevr": f"{_HERE}.clevr:ClevrSource",
        "coco": f"{_HERE}.coco:CocoSource",
        "conceptual_captions": f"{_HERE}.conceptual_captions:ConceptualCaptionsSource",
        "csv": f"{_HERE}.csv_table:CsvSource",
        "daquar": f"{_HERE}.daquar:DaquarSource",
        "easy_vqa": f"{_HERE}.easy_vqa:EasyVqaSource",
        "flickr_tokens": f"{_HERE}.flickr_tokens:FlickrTokensSource",
        "gqa": f"{_HERE}.gqa:GqaSource",
        "hf_dataset": f"{_HERE}.hf_dataset:HfDatasetSource",
        "image_folder": f"{_HERE}.image_folder:ImageFolderSource",
        "karpathy": f"{_HERE}.karpathy:KarpathySource",
        "llava": f"{_HERE}.llava:LlavaSource",
        "objects": f"{_HERE}.objects:ObjectsSource",
        "qa": f"{_HERE}.qa:QaSource",
        "refcoco": f"{_HERE}.refcoco:RefCocoSource",
        "visual_genome": f"{_HERE}.visual_genome:VisualGenomeSource",
        "vizwiz": f"{_HERE}.vizwiz:VizWizSource",
        "vqa_v2": f"{_HERE}.vqa_v2:VqaV2Source",
        "webdataset": f"{_HERE}.webdataset_tars:WebDatasetSource",
    },
    group="frozenprefix.sources",
    base=SourceConfig,
)
S = TypeVar("S", bound=type[SourceConfig])


def register_source(name: str) -> Callable[[S], S]:
    """Decorator for a data source of your own, which recipes then name: `train: [{type: NAME, path: …}]`.

    An installed package can have it as an entry point of the group `frozenprefix.sources` instead.

    Raises:
        ConfigError: for a name that is taken, and for what is no `SourceConfig`.

    Example:
        >>> @register_source("file_names")
        ... class FileNames(SourceConfig):
        ...     type: str = "file_names"
        ...     ending: str = ".png"
        ...
        ...     def read(self, root):
        ...         files = sorted(root.glob(f"*{self.ending}"))
        ...         return [Sample(file.name, (file,), (file.stem.replace("_", " "),)) for file in files]
        >>> load_source({"type": "file_names", "path": str(images_folder)})[0].targets
        ('blue circle',)
    """
    return SOURCES.register(name)


def parse_source(config: dict[str, Any] | SourceConfig) -> SourceConfig:
    """Turn a dict with a `type` into that source's typed config.

    Raises:
        ConfigError: for an unknown type, and for all unknown keys and wrong values at once.

    Example:
        >>> parse_source({"type": "captions", "path": "data"}).file
        'captions.jsonl'
    """
    if isinstance(config, SourceConfig):
        return config
    if "type" not in config:
        raise ConfigError(f"data source: field 'type' is missing, expected one of {', '.join(SOURCES.names())}")
    source = SOURCES.get(config["type"])
    try:
        return source.model_validate(config)
    except ValidationError as error:
        raise ConfigError([_problem(source, config["type"], item) for item in error.errors()]) from error


def load_source(
    config: dict[str, Any] | SourceConfig, *, base: Path | None = None, images: bool = True
) -> list[Sample]:
    """Read one source: all its samples, of the wanted splits, held-out part and first images, in file order.

    Args:
        config: a typed source config, or the dict of one.
        base: folder against which a relative `path` is taken; the working directory when not given.
        images: False for texts alone, whose images need not be there.

    Raises:
        ConfigError: for a wrong config.
        AssetError: when `path` cannot be found or fetched.
        DataError: for a malformed row, naming file, line and field; a split that is not there; repeated ids; and when
            not one of the images exists. Single missing images are left to be counted by their readers.

    Example:
        >>> len(load_source({"type": "captions", "path": str(data_folder)}))
        12
    """
    source = parse_source(config)
    root = resolve(source.path, base=base)
    samples = with_one_name_per_image(source.read(root), where=source.path) if images else source.read(root)
    samples = of_split(samples, source.split, where=source.path)
    if source.holdout is not None:
        samples = hold_out(samples, source.holdout, root)
    samples = first_images(samples, source.limit)
    if images:
        check_images_exist(samples, where=source.path)
    samples = [_labelled(sample, source) for sample in with_valid_text(samples, where=source.path)]
    check_unique_ids(samples)
    log.info("%s %s: %d samples", source.type, source.path, len(samples))
    return samples


def load_sources(
    configs: Iterable[dict[str, Any] | SourceConfig], *, base: Path | None = None, images: bool = True
) -> list[Sample]:
    """Read several sources, one after the other, into one list with unique ids, and one path for each image.

    Args:
        base, images: as for `load_source`.

    Example:
        >>> len(load_sources(detect_sources(data_folder))) > 12
        True
    """
    samples: list[Sample] = []
    for config in configs:
        samples += load_source(config, base=base, images=images)
    check_unique_ids(samples)
    return with_one_name_per_image(samples, where="sources") if images else samples


def open_source(config: dict[str, Any] | SourceConfig, *, base: Path | None = None) -> StreamedGroups:
    """Open a source with `stream: true`: its samples are read from shards when a step needs them.

    Raises:
        ConfigError: for a source that cannot be streamed.
        AssetError, DataError: as `load_source`, but a malformed row is met when it is read.

    Example:
        >>> len(open_source({"type": "captions", "path": str(data_folder), "stream": True}))
        12
    """
    source = parse_source(config)
    if not isinstance(source, StreamedSource):
        raise ConfigError(
            f"data source '{source.type}': cannot be streamed; write it as shards with `frozenprefix data build`"
        )
    root = Path(source.path) if is_address(source.path) else resolve(source.path, base=base)
    groups = source.open(root, partial(_labelled, source=source))
    if not len(groups):
        raise DataError(f"{source.path}: got 0 samples, expected at least one")
    log.info("%s %s: %d samples in %d shards, streamed", source.type, source.path, len(groups), len(groups.names))
    return groups


def _labelled(sample: Sample, source: SourceConfig) -> Sample:
    changes: dict[str, Any] = {}
    if source.name is not None:
        changes["id"] = f"{source.name}:{sample.id}"
    if source.prompt is not None and sample.prompt is None:
        changes["prompt"] = source.prompt
    return replace(sample, **changes) if changes else sample


def _problem(source: type[SourceConfig], type_name: str, item: Any) -> str:
    field = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = source.model_fields
        return (
            f"data source '{type_name}': unknown field '{field}'{did_you_mean(field, known)}; known: {', '.join(known)}"
        )
    got = "" if item["type"] == "missing" else f", got {item['input']!r}"
    return f"data source '{type_name}': field '{field}': {item['msg']}{got}"
