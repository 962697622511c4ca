"""JSON lines: one reader and one writer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from frozenprefix.errors import DataError
from frozenprefix.utils.files import atomic_file, encode_text
from frozenprefix.utils.reports import report


def read_jsonl(path: str | PathLike[str], *, skip_damaged: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield the line number (from 1) and the value of every line that is not blank.

    Lines end at a line feed only; a text may contain U+2028 and other line separators.

    Args:
        skip_damaged: for files that a killed process may have left unfinished: lines that are not JSON are left
            out, and counted in the log.

    Raises:
        DataError: the file cannot be read; or, naming file and line, a line is not UTF-8 or not JSON.

    Example:
        >>> write_jsonl(tmp_path / "rows.jsonl", [{"id": 1}, {"id": 2}])
        >>> list(read_jsonl(tmp_path / "rows.jsonl"))
        [(1, {'id': 1}), (2, {'id': 2})]
    """
    total = damaged = 0
    for number, _, line in read_lines(path):
        total += 1
        try:
            value = parse_line(path, number, line)
        except DataError:
            if not skip_damaged:
                raise
            damaged += 1
        else:
            yield number, value
    report(path, total, {"unfinished": damaged}, what="lines")


def read_lines(path: str | PathLike[str]) -> Iterator[tuple[int, int, bytes]]:
    """Yield number (from 1), place in the file and bytes of every line that is not blank.

    Raises:
        DataError: the file cannot be read.

    Example:
        >>> write_jsonl(tmp_path / "rows.jsonl", [{"id": 1}, {"id": 2}])
        >>> list(read_lines(tmp_path / "rows.jsonl"))[1]
        (2, 10, b'{"id": 2}\\n')
    """
    place = 0
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                start, place = place, place + len(line)
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):  # byte order mark
                    start, line = 3, line[3:]
                if line.strip():
                    yield number, start, line
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; expected a file of JSON lines there") from error


def parse_line(path: str | PathLike[str], number: int, line: bytes) -> Any:
    """The value of a line.

    Raises:
        DataError: naming file and line, it is not UTF-8 or not JSON.

    Example:
        >>> parse_line("rows.jsonl", 1, b"[1]")
        [1]
    """
    try:
        return parse_json(line.decode("utf-8"))
    except ValueError as error:
        raise DataError(_reason(path, number, line, error)) from error


def parse_json(text: str) -> Any:
    """Parse JSON text in which no object has a field twice: Python's parser would drop the first one silently.

    Raises:
        ValueError: as `json.loads`, and for a field that occurs twice.

    Example:
        >>> parse_json('{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ValueError: field 'a' occurs twice in an object
    """
    try:
        return _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("lists or objects are nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field '{repeated}' occurs twice in an object")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)  # `json.loads` would make one for every text


def write_jsonl(path: str | PathLike[str], rows: Iterable[Any]) -> None:
    """Write rows, one a line; the file replaces an older one when all are written. Rows may be an iterator.

    Example:
        >>> write_jsonl(tmp_path / "rows.jsonl", ({"id": number} for number in range(3)))
    """
    with atomic_file(path) as draft, draft.open("wb") as file:
        for row in rows:
            file.write(_line(row))


def append_jsonl(path: str | PathLike[str], rows: Iterable[Any]) -> None:
    """Add rows at the end of a file, after a line that a killed process left unfinished.

    Example:
        >>> append_jsonl(tmp_path / "log.jsonl", [{"step": 1}])
        >>> append_jsonl(tmp_path / "log.jsonl", [{"step": 2}])
        >>> len(list(read_jsonl(tmp_path / "log.jsonl")))
        2
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = b"".join(map(_line, rows))
    is_plain = path.is_file() or not path.exists()
    mode = "a+b" if is_plain else "wb"  # pipes and devices, such as /dev/stdout
    with path.open(mode, buffering=0) as file:  # in one piece, as other processes may append at the same time
        if is_plain and file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                lines = b"\n" + lines
        file.write(lines)


def _line(row: Any) -> bytes:
    return encode_text(json.dumps(row, ensure_ascii=False)) + b"\n"


def _reason(path: str | PathLike[str], number: int, line: bytes, error: ValueError) -> str:
    if b"\r" in line.strip():
        return f"{path}:{number}: not JSON: the lines end in carriage returns; convert them to line feeds"
    if isinstance(error, json.JSONDecodeError):
        return f"{path}:{number}: not JSON ({error.msg}, column {error.colno}); expected one object a line"
    if isinstance(error, UnicodeDecodeError):
        return f"{path}:{number}: not UTF-8 text (byte {error.start} of the line); convert the file to UTF-8"
    return f"{path}:{number}: {error}"
