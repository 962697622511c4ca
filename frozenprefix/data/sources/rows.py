"""Checked reading of JSON and tables: every error names file, place and field, the value and the expected value."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from frozenprefix.errors import DataError, did_you_mean, shorten
from frozenprefix.utils import parse_json, read_jsonl, read_text


class Row:
    """One JSON object and the place it came from.

    Args:
        file: the file, with the line where there is one: "captions.jsonl:12".
        values: the object.
        part: the place within the file or line: "annotations[3]".

    Example:
        >>> row = Row("qa.jsonl:3", {"image": "1.jpg", "answers": ["red"]})
        >>> row.text("image"), row.texts("answers"), row.where
        ('1.jpg', ('red',), 'qa.jsonl:3')
    """

    def __init__(self, file: str, values: Any, part: str = ""):
        self._file, self._part = file, part
        if not isinstance(values, dict):
            raise DataError(f"{self.where}: got {shorten(values, 80)}, expected an object with named fields")
        self._values: dict[str, Any] = values

    @property
    def where(self) -> str:
        return f"{self._file}: {self._part}" if self._part else self._file

    def __contains__(self, field: object) -> bool:
        return self._values.get(field) is not None  # type: ignore[call-overload]

    def either(self, *fields: str) -> str:
        """The first of several fields that has a value; where none has, the first that is there, or the last one."""
        there = [field for field in fields if field in self._values]
        return next((field for field in there if field in self), [*there, fields[-1]][0])

    def text(self, field: str) -> str:
        """A text with at least one character."""
        value = self._get(field)
        if not isinstance(value, str) or not value:
            raise self._wrong(field, value, "a text that is not empty")
        return value

    def text_or_none(self, field: str) -> str | None:
        return self.text(field) if field in self else None

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of texts, or a single text. Empty ones are kept: they are counted when the data is checked."""
        items = self._texts(field)
        if items is None:
            raise self._wrong(field, self._get(field), "a text or a list of texts")
        return items

    def names(self, field: str) -> tuple[str, ...]:
        """A list of texts, or a single text: at least one, and none that is empty."""
        items = self._texts(field)
        if not items or "" in items:
            raise self._wrong(field, self._get(field), "a text that is not empty, or a list of such texts")
        return items

    def _texts(self, field: str) -> tuple[str, ...] | None:
        value = self._get(field)
        items = [value] if isinstance(value, str) else value
        return tuple(items) if isinstance(items, list) and all(isinstance(item, str) for item in items) else None

    def integer(self, field: str) -> int:
        value = self._get(field)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(field, value, "a whole number")
        return value

    def identifier(self, field: str) -> str:
        """An id, written as a number or as a text."""
        value = self._get(field)
        if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
            raise self._wrong(field, value, "a number or a text")
        return str(value)

    def values(self, field: str) -> list[Any]:
        """A list."""
        value = self._get(field)
        if not isinstance(value, list):
            raise self._wrong(field, value, "a list")
        return value

    def rows(self, field: str) -> list[Row]:
        """A list of objects."""
        value = self.values(field)
        part = f"{self._part}.{field}" if self._part else field
        return [Row(self._file, item, f"{part}[{number}]") for number, item in enumerate(value)]

    def row(self, field: str) -> Row:
        """An object."""
        return Row(self._file, self._get(field), f"{self._part}.{field}" if self._part else field)

    def fields(self) -> list[str]:
        """The names of all fields."""
        return list(self._values)

    def value_or_none(self, field: str) -> Any:
        """Any value, unchecked."""
        return self._values.get(field)

    def _get(self, field: str) -> Any:
        if field not in self._values:
            got = ", ".join(self._values) or "none"
            raise DataError(
                f"{self.where}: field '{field}' is missing{did_you_mean(field, self._values)}; got the fields: {got}"
            )
        if self._values[field] is None:
            raise DataError(f"{self.where}: field '{field}': got null, expected a value")
        return self._values[field]

    def _wrong(self, field: str, value: Any, expected: str) -> DataError:
        return DataError(f"{self.where}: field '{field}': got {shorten(value, 80)}, expected {expected}")


def rows_by_id(rows: Iterable[Row], field: str) -> dict[str, Row]:
    """Rows by an id that must not repeat.

    Raises:
        DataError: naming both rows of the same id.

    Example:
        >>> list(rows_by_id([Row("a.json", {"id": 7})], "id"))
        ['7']
    """
    by_id: dict[str, Row] = {}
    for row in rows:
        name = row.identifier(field)
        other = by_id.setdefault(name, row)
        if other is not row:
            raise DataError(f"{row.where}: field '{field}': got {name}, which is the id of {other.where} too")
    return by_id


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        DataError: the file cannot be read or is not JSON, or an object in it has a field twice.
    """
    try:
        return parse_json(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno})") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: {error}") from error


def read_json_object(path: Path) -> Row:
    """Return the one object of a JSON file."""
    return Row(str(path), read_json(path))


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """The rows of a JSON file that holds a list of objects, numbered from 0, or of a JSON-lines file, from 1.

    Example:
        >>> len(list(read_rows(data_folder / "captions.jsonl")))
        12
    """
    if path.suffix != ".json":
        for number, values in read_jsonl(path):
            yield number, Row(f"{path}:{number}", values)
        return
    rows = read_json(path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: got a JSON {type(rows).__name__}, expected a list of objects")
    for number, values in enumerate(rows):
        yield number, Row(str(path), values, f"[{number}]")


def read_table(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    r"""The rows of a UTF-8 text table, as `table_rows` gives them.

    Example:
        >>> _ = (tmp_path / "a.tsv").write_text('1.jpg\t"a ""big"" dog"\n2.jpg\t"no" he said\n')
        >>> [cells[1] for _, cells in read_table(tmp_path / "a.tsv", "\t")]
        ['a "big" dog', '"no" he said']
    """
    return table_rows(read_text(path), delimiter)


def table_rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    r"""Yield the line number (from 1) and the cells of every row of a text table that is not blank.

    As in CSV, a cell may be in double quotes; it may then hold delimiters, line ends and quotes, which are doubled. A
    cell that only begins with a quote, as in tables that were written without quoting, is taken as it is.

    Example:
        >>> list(table_rows('1.jpg;"a;b"\n\n2.jpg;c', ";"))
        [(1, ['1.jpg', 'a;b']), (3, ['2.jpg', 'c'])]
    """
    text = text.replace("\r\n", "\n")
    if "\n" not in text:
        text = text.replace("\r", "\n")  # as old spreadsheets end lines
    mark = re.escape(delimiter)
    quoted = re.compile(rf'"((?:[^"]|"")*)"(?=[{mark}\n]|$)')
    plain = re.compile(rf"[^{mark}\n]*")
    place, line = 0, 1
    while place < len(text):
        first, cells = line, []
        while True:
            if match := quoted.match(text, place):
                cells.append(match[1].replace('""', '"'))
            else:
                match = plain.match(text, place)
                assert match is not None  # it matches nothing, too
                cells.append(match[0])
            line += match[0].count("\n")
            place = match.end()
            if text[place : place + 1] != delimiter:
                break
            place += 1
        place, line = place + 1, line + 1  # past the line end
        if any(cell.strip() for cell in cells):
            yield first, cells
