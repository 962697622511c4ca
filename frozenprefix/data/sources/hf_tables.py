"""The tables of a data set of Hugging Face's library `datasets`, and the images in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frozenprefix.data.images import image_ending
from frozenprefix.data.sources.image_files import write_image
from frozenprefix.data.sources.selection import files_of
from frozenprefix.errors import DataError
from frozenprefix.utils.damage import refusing_damage

try:
    import datasets
    import pyarrow.ipc
    import pyarrow.parquet
except ImportError as error:
    raise DataError(f"data source 'hf_dataset' needs the library datasets ({error}); pip install datasets") from error


@dataclass(frozen=True)
class Table:
    """One table: a split of a saved data set, or one file. `load` returns the columns that it is asked for."""

    name: str
    split: str | None
    files: list[Path]
    columns: list[str]
    load: Callable[[list[str]], datasets.Dataset]


def tables_of(root: Path, pattern: str | None, *, check: bool = True) -> list[Table]:
    """The tables of a folder of `save_to_disk`; or of the files that match `pattern`, by default all parquet files.

    Args:
        check: read each arrow file as a whole first. Arrow files are mapped into memory, where pyarrow trusts their
            offsets and sizes, and crashes if the file is damaged.
    """
    if pattern is None and _is_saved(root):
        with refusing_damage(DataError, f"{root}: cannot be read as a folder of save_to_disk ({{reason}})"):
            if check:
                for file in sorted(root.rglob("*.arrow")):
                    _check_arrow(file)
            return _saved(root)
    return _in_files(root, pattern or "**/*.parquet", check)


def _check_arrow(file: Path) -> None:
    with pyarrow.OSFile(str(file)) as source, pyarrow.ipc.open_stream(source) as batches:
        for batch in batches:
            batch.validate(full=True)


def take_images(table: Table, column: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Write the images of a table; yield for each row the written file, or the path that the row names instead."""
    rows = table.load([column])
    if isinstance(rows.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    for number, row in enumerate(rows):
        data, path = image_value(row[column], f"{table.files[0]}: row {number}: column '{column}'")
        yield {"file": write_image(folder, data, image_ending(path or "")) if data else None, "path": path}


def image_value(value: Any, where: str) -> tuple[bytes | None, str | None]:
    """The bytes and the path of an image in a table, of which one or both may be missing."""
    if value is None or isinstance(value, bytes):
        value = {"bytes": value, "path": None}
    if not isinstance(value, dict) or not {"bytes", "path"} <= set(value):
        raise DataError(f"{where}: got {value!r:.60}, expected an image")
    return value["bytes"], value["path"]


def _is_saved(root: Path) -> bool:
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def _saved(root: Path) -> list[Table]:
    loaded = datasets.load_from_disk(str(root))
    splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {loaded.split: loaded}
    return [_table(rows, str(split or root.name), split and str(split)) for split, rows in splits.items()]


def _table(rows: datasets.Dataset, name: str, split: str | None) -> Table:
    files = [Path(file["filename"]) for file in rows.cache_files]
    return Table(name, split, files, rows.column_names, rows.select_columns)


def _in_files(root: Path, pattern: str, check: bool) -> list[Table]:
    tables = []
    for file, split in files_of(root, pattern).items():
        shard = re.match(r"(.+)-\d{5}-of-\d{5}$", file.stem)
        split = shard.group(1) if shard else split
        name = file.relative_to(root).with_suffix("").as_posix()
        with refusing_damage(DataError, f"{file}: cannot be read as a table ({{reason}}); fetch it again"):
            if file.suffix == ".arrow":
                if check:
                    _check_arrow(file)
                tables.append(_table(datasets.Dataset.from_file(str(file)), name, split))
            else:
                columns = pyarrow.parquet.read_schema(file).names
                tables.append(Table(name, split, [file], columns, _parquet_loader(file)))
    return tables


def _parquet_loader(file: Path) -> Callable[[list[str]], datasets.Dataset]:
    return lambda columns: datasets.Dataset(pyarrow.parquet.read_table(file, columns=columns, partitioning=None))
