"""Checked reading of JSON rows: every error says file, place, field, what was got and what was expected."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from frozenprefix.errors import DataError, did_you_mean


class Row:
    """One JSON object and the place it came from.

    Args:
        file: the file, with the line where there is one: "captions.jsonl:12".
        values: the object.
        part: the place within the file or line: "annotations[3]".
    """

    def __init__(self, file: str, values: Any, part: str = ""):
        self._file, self._part = file, part
        if not isinstance(values, dict):
            raise DataError(f"{self.where}: got {_shown(values)}, expected an object with named fields")
        self._values: dict[str, Any] = values

    @property
    def where(self) -> str:
        return f"{self._file}: {self._part}" if self._part else self._file

    def __contains__(self, field: object) -> bool:
        return self._values.get(field) is not None  # type: ignore[call-overload]

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

    def rows(self, field: str) -> list[Row]:
        """A list of objects."""
        value = self._get(field)
        if not isinstance(value, list):
            raise self._wrong(field, value, "a list of objects")
        part = f"{self._part}.{field}" if self._part else field
        return [Row(self._file, item, f"{part}[{number}]") for number, item in enumerate(value)]

    def row(self, field: str) -> Row:
        """An object."""
        return Row(self._file, self._get(field), f"{self._part}.{field}" if self._part else field)

    def fields(self) -> list[str]:
        """The names of all fields."""
        return list(self._values)

    def _get(self, field: str) -> Any:
        if self._values.get(field) is None:
            got = ", ".join(self._values) or "none"
            raise DataError(
                f"{self.where}: field '{field}' is missing{did_you_mean(field, self._values)}; got the fields: {got}"
            )
        return self._values[field]

    def _wrong(self, field: str, value: Any, expected: str) -> DataError:
        return DataError(f"{self.where}: field '{field}': got {_shown(value)}, expected {expected}")


def read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the line number (from 1) and the row of each line of a JSON-lines file. Blank lines are passed over."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: not JSON ({error.msg}, column {error.colno}); one object a line"
            ) from error
        yield number, Row(f"{path}:{number}", values)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno})") from error


def read_json_object(path: Path) -> Row:
    """Return the one object that a JSON file holds."""
    return Row(str(path), read_json(path))


def read_rows(path: Path) -> list[tuple[int, Row]]:
    """The rows of a JSON file that holds a list of objects, numbered from 0, or of a JSON-lines file, from 1."""
    if path.suffix != ".json":
        return list(read_jsonl(path))
    rows = read_json(path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: got a JSON {type(rows).__name__}, expected a list of objects")
    return [(number, Row(str(path), row, f"[{number}]")) for number, row in enumerate(rows)]


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); convert the file to UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; expected the source's text or JSON file there") from error


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
