"""Training data from Python objects: lists of samples, data sets of torch, of torchvision and of Hugging Face."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.columns import columns_fit, find_columns, sample_of_row
from frozenprefix.data.sources.rows import Row
from frozenprefix.errors import BadImageError, ConfigError, DataError, shorten
from frozenprefix.utils import build_once, content_hash, progress_bar, read_jsonl, user_cache, write_jsonl
from frozenprefix.utils.files import write_bytes_atomic
from frozenprefix.utils.images import to_image

_FILE = "samples.jsonl"
_IMAGES = "images"
_WHERE = "objects"


class ObjectsSource(SourceConfig):
    """Samples that `source_from` has kept in the user's cache, in a folder that is named by their content.

    Example:
        >>> ObjectsSource.model_validate(source_from([(image_path, "a red circle")])).type
        'objects'
    """

    type: Literal["objects"] = "objects"

    def read(self, root: Path) -> list[Sample]:
        return [_restored(values, root, f"{root / _FILE}:{number}") for number, values in read_jsonl(root / _FILE)]


def source_from(
    data: Any,
    *,
    image: str = "image",
    captions: str | None = None,
    question: str | None = None,
    answers: str | None = None,
    label: str | None = None,
    convert: Callable[[Any], Any] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Make a source for `data.train` or `data.validation` of a recipe from objects.

    An item is a `Sample`, a dict, or a tuple of an image and its text(s), or of image, question and answer(s). A dict
    has the columns of source `hf_dataset`. Where an item of a torchvision data set ends in a class number,
    `data.classes` names it. An image is a path, the bytes of a file, a PIL image, an array or a tensor of pixels that
    are not normalised; a list of images is shown in this order.

    The data is read once, to its end. Images that are no paths are written, without loss, into the user's cache, and
    the samples beside them; the same data is not written twice. A run is therefore resumed and evaluated like any
    other.

    Args:
        data: a list or other iterable, a `torch.utils.data.Dataset`, or a `datasets.Dataset`.
        image, captions, question, answers, label: names of columns, as of source `hf_dataset`.
        convert: called on every item first.
        fields: of every source: `split`, `holdout`, `limit`, `prompt`, `name`.

    Raises:
        DataError: naming the item that is no sample.
        ConfigError: for columns that do not go together.

    Example:
        >>> from frozenprefix.data import load_source
        >>> source = source_from([{"image": image, "caption": "a red circle"}, (image_path, ["a circle", "it is red"])])
        >>> [sample.targets for sample in load_source(source)]
        [('a red circle',), ('a circle', 'it is red')]
    """
    if not columns_fit(captions, question, answers, label):
        raise ConfigError("source_from: got columns of several tasks; name captions, or question and answers, or label")
    columns = {"captions": captions, "question": question, "answers": answers, "label": label}
    classes = getattr(data, "classes", None)
    reader = _Reader(image, columns, classes if isinstance(classes, Sequence) else None)
    rows = []
    with progress_bar("reading objects") as update:
        for number, item in enumerate(_items(data, image)):
            rows.append(reader.row(item if convert is None else convert(item), number))
            update(number + 1, len(data) if isinstance(data, Sized) else number + 1)
    if not rows:
        raise DataError(f"{_WHERE}: got no items, expected at least one")
    state = content_hash(*(json.dumps(row, sort_keys=True) for row in rows))
    folder = build_once(_folder() / state[:16], lambda draft: write_jsonl(draft / _FILE, rows))
    return {"type": "objects", "path": str(folder), **fields}


class _Reader:
    """Turns items into plain rows, and keeps their images."""

    def __init__(self, image: str, columns: Mapping[str, str | None], classes: Sequence[str] | None):
        self.image, self.columns, self.classes = image, columns, classes

    def row(self, item: Any, number: int) -> dict[str, Any]:
        where = f"{_WHERE}[{number}]"
        sample = self._sample(item, str(number), where)
        row = {entry.name: getattr(sample, entry.name) for entry in dataclasses.fields(sample) if entry.name != "where"}
        row["images"] = [_kept(image, where) for image in sample.images]
        try:
            json.dumps(row)
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: {error}; expected texts and, in metadata, JSON values") from error
        return row

    def _sample(self, item: Any, name: str, where: str) -> Sample:
        if isinstance(item, Sample):
            return item
        if isinstance(item, tuple | list) and 2 <= len(item) <= 3:
            item = self._named(item, where)
            columns = {role: role for role in item if role != "image"}
            image = "image"
        elif isinstance(item, Mapping):
            columns, image = find_columns(list(item), self.image, self.columns, where), self.image
        else:
            raise DataError(
                f"{where}: got {shorten(item, 80)}, expected a Sample, a dict with an image and texts, or a tuple of "
                "an image and its texts; `convert` can make one of it"
            )
        images = item[image] if isinstance(item[image], list | tuple) else (item[image],)
        if any(one is None for one in images):
            raise DataError(f"{where}: column '{image}': got None, expected an image")
        values = {column: _plain(item[column]) for column in columns.values()}
        split = item.get("split") if isinstance(item.get("split"), str) else None
        return sample_of_row(Row(where, values), columns, name, tuple(images), split)

    def _named(self, item: Sequence[Any], where: str) -> dict[str, Any]:
        if len(item) == 3:
            return dict(zip(("image", "question", "answers"), item, strict=True))
        image, text = item
        if isinstance(text, int) and not isinstance(text, bool):
            if self.classes is None or not 0 <= text < len(self.classes):
                raise DataError(
                    f"{where}: got the number {text} for a text, and no class of that number; use `convert`"
                )
            return {"image": image, "label": str(self.classes[text])}
        return {"image": image, "captions": text}


def _items(data: Any, image: str) -> Iterator[Any]:
    """The items of a data set, each once."""
    if hasattr(data, "features") and hasattr(data, "cast_column"):
        yield from _table_rows(data, image)
    elif hasattr(data, "__iter__") and not isinstance(data, str | bytes | Mapping):
        yield from data
    elif hasattr(data, "__getitem__") and isinstance(data, Sized) and not isinstance(data, str | bytes | Mapping):
        getitem: Any = data
        yield from (getitem[number] for number in range(len(data)))
    else:
        hint = f"; choose a split of it: {', '.join(map(str, data))}" if isinstance(data, Mapping) else ""
        raise DataError(f"{_WHERE}: got {type(data).__name__}, expected a list or a data set of samples{hint}")


def _table_rows(data: Any, image: str) -> Iterator[Any]:
    """Rows of a `datasets.Dataset`, with the bytes of image files as they are, and labels by their names."""
    import datasets

    features = data.features or {}
    if isinstance(features.get(image), datasets.Image):
        data = data.cast_column(image, datasets.Image(decode=False))
    names = {column: feature for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)}
    for row in data:
        yield {
            column: names[column].int2str(value) if column in names and value is not None and value >= 0 else value
            for column, value in row.items()
        }


def _kept(image: Any, where: str) -> str:
    """The path of an image: its own, or that of a file in the user's cache, relative to the samples."""
    if isinstance(image, dict) and {"bytes", "path"} <= image.keys():
        image = image["bytes"] or image["path"]
    if isinstance(image, str | PathLike):
        path = fspath(image)
        if not isinstance(path, str) or path.startswith(("http://", "https://")):
            raise DataError(f"{where}: image: got {shorten(path)}, expected the path of a file on this machine")
        return str(Path(path).expanduser().absolute())
    if not isinstance(image, bytes):
        try:
            pixels = to_image(image, where)
        except BadImageError as error:
            raise DataError(str(error)) from error
        buffer = io.BytesIO()
        pixels.save(buffer, format="PNG", compress_level=1)
        image = buffer.getvalue()
    name = content_hash(image)
    file = _folder() / _IMAGES / name
    if not file.is_file():
        write_bytes_atomic(file, image)
    return f"../{_IMAGES}/{name}"


def _folder() -> Path:
    return user_cache() / "objects"


def _plain(value: Any) -> Any:
    """Texts as a source has them: tuples become lists."""
    return list(value) if isinstance(value, tuple) else value


def _restored(values: Any, root: Path, where: str) -> Sample:
    row = Row(where, values)
    history = values.get("history")
    return Sample(
        id=row.identifier("id"),
        images=tuple(root / name for name in row.texts("images")),
        targets=row.texts("targets"),
        prompt=values.get("prompt"),
        question=values.get("question"),
        history=None if history is None else tuple((question, answer) for question, answer in history),
        split=values.get("split"),
        task=row.text("task"),
        metadata={name: _hashable(value) for name, value in values.get("metadata", {}).items()},
        where=where,
    )


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
