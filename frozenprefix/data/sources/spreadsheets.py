"""Tables as people keep them: CSV and TSV of any delimiter and encoding, Excel, JSON and JSON lines."""

from __future__ import annotations

import codecs
import io
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from frozenprefix.data.images import image_ending
from frozenprefix.data.sources.rows import Row, read_json, read_rows, table_rows
from frozenprefix.errors import DataError, did_you_mean
from frozenprefix.utils.damage import refusing_damage

log = logging.getLogger(__name__)

TEXT_TABLES = (".csv", ".tsv", ".tab", ".txt")
EXCEL = (".xlsx", ".xlsm")
TABLE_ENDINGS = (".csv", ".tsv", ".tab", *EXCEL, ".json", ".jsonl")
#: The longest table that is read: more rows than a sheet of Excel has.
MAX_BYTES = 1 << 30
_DELIMITERS = ",;\t|"
_ROWS_TO_LOOK_AT = 50
# the longer mark first: UTF-32's begins with UTF-16's
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_OTHER_PROGRAMS = {".xls": "Excel 97", ".ods": "LibreOffice", ".numbers": "Apple Numbers"}


@dataclass(frozen=True)
class Spreadsheet:
    """A table with named columns.

    Attributes:
        columns: their names, in order.
        rows: every row that is not blank, with its place in the file; cells are texts, or lists of texts from JSON,
            and absent where they are blank.

    Example:
        >>> Spreadsheet(["image"], [Row("a.csv:2", {"image": "1.jpg"})]).rows[0].text("image")
        '1.jpg'
    """

    columns: list[str]
    rows: list[Row]


def is_table(path: Path) -> bool:
    """Whether a file is a table by its name. Excel's mark of an open workbook, `~$a.xlsx`, is none.

    Example:
        >>> is_table(Path("a.XLSX")), is_table(Path("~$a.xlsx")), is_table(Path("a.jpg"))
        (True, False, False)
    """
    return path.suffix.lower() in TABLE_ENDINGS and not path.name.startswith("~$")


def read_spreadsheet(
    path: Path, *, delimiter: str | None = None, encoding: str | None = None, sheet: str | None = None
) -> Spreadsheet:
    r"""Read a table by the ending of its name: text, Excel, JSON or JSON lines.

    The first row has the names of the columns, unless a cell of it is the name of an image: then they are "column 1",
    "column 2", … JSON is a list of objects, an object with one such list in it, or an object from names of images to
    texts.

    Args:
        delimiter: between the cells of a text table; found out when None.
        encoding: of a text table, as Python names it. None: by its byte order mark, UTF-8, UTF-16, or Windows-1252.
        sheet: of a workbook; the first one when None.

    Raises:
        DataError: naming the row that is damaged; for another kind of file; without openpyxl for Excel.

    Example:
        >>> _ = (tmp_path / "a.csv").write_bytes("Bild;Text\n1.jpg;M\u00fcller\n".encode("cp1252"))
        >>> read_spreadsheet(tmp_path / "a.csv").rows[0].text("Text")
        'Müller'
    """
    ending = path.suffix.lower()
    if ending in (".json", ".jsonl"):
        return _from_json(path, ending)
    if ending in _OTHER_PROGRAMS:
        raise DataError(f"{path}: is a table of {_OTHER_PROGRAMS[ending]}; save it as .xlsx or .csv")
    if ending in EXCEL:
        return _with_columns(path, _excel_rows(path, sheet), "row ")
    if ending in TEXT_TABLES:
        text = decode_table(_bytes_of(path), path, encoding)
        return _with_columns(path, *_text_rows(path, text, delimiter))
    raise DataError(f"{path}: is no table by its name; expected a file ending in {', '.join(TABLE_ENDINGS)}")


def decode_table(data: bytes, path: Path, encoding: str | None = None) -> str:
    r"""The text of a file in any of the encodings that spreadsheets write.

    Raises:
        DataError: no encoding fits, or the file is a workbook or an archive.

    Example:
        >>> decode_table("é".encode("utf-16"), Path("a.csv")), decode_table(b"\xe9", Path("a.csv"))
        ('é', 'é')
    """
    if encoding is not None:
        try:
            return data.decode(encoding)
        except LookupError as error:
            raise DataError(f"{path}: `encoding`: got '{encoding}', expected a name such as utf-8 or cp1252") from error
        except ValueError as error:
            raise DataError(f"{path}: is not {encoding} ({error})") from error
    if data.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise DataError(f"{path}: is a workbook or an archive, and no text; give it its own ending, such as .xlsx")
    for name in _encodings_of(data):
        try:
            text = data.decode(name)
        except UnicodeDecodeError:
            continue
        if "\0" in text:
            break
        if name == "cp1252":
            log.info("%s: is not UTF-8; read as Windows-1252 (`encoding` names another one)", path)
        return text
    raise DataError(f"{path}: is no text in UTF-8, UTF-16 or Windows-1252; name its `encoding`, or save it as UTF-8")


def _encodings_of(data: bytes) -> list[str]:
    for mark, name in _BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return [name]
    head = data[:4096]
    if b"\0" in head:  # every second byte of most text in UTF-16
        return ["utf-16-le" if head[1::2].count(0) > head[::2].count(0) else "utf-16-be"]
    return ["utf-8", "cp1252"]


def _bytes_of(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{path}: has {size / 1e9:.1f} GB, expected at most {MAX_BYTES / 1e9:.1f} GB")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; expected a table there") from error


# ── rows of cells ──

Cells = Iterable[tuple[int, list[str]]]


def _text_rows(path: Path, text: str, delimiter: str | None) -> tuple[Cells, str]:
    """Rows, and what is put before their numbers in messages."""
    first, _, rest = text.partition("\n")
    skipped = 0
    if first.strip().strip('"').lower().startswith("sep=") and len(first.strip().strip('"')) <= 5:  # Excel's own mark
        delimiter = delimiter or first.strip().strip('"')[4:] or "\t"
        text, skipped = rest, 1
    delimiter = delimiter or _delimiter_of(text)
    if len(delimiter) != 1:
        raise DataError(f"{path}: `delimiter`: got {delimiter!r}, expected one character")
    return ((line + skipped, cells) for line, cells in table_rows(text, delimiter)), ""


def _delimiter_of(text: str) -> str:
    """The delimiter by which most rows have as many cells as the first one; the comma when there is none."""

    def fit(mark: str) -> tuple[float, int]:
        sizes = [len(cells) for _, cells in islice(table_rows(text, mark), _ROWS_TO_LOOK_AT)]
        if not sizes or sizes[0] < 2:
            return 0.0, 0
        return sizes.count(sizes[0]) / len(sizes), sizes[0]

    best = max(_DELIMITERS, key=fit)
    return best if fit(best)[1] else ","


def _excel_rows(path: Path, sheet: str | None) -> Iterator[tuple[int, list[str]]]:
    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise DataError(
            f"{path}: Excel tables need openpyxl; pip install 'frozenprefix[excel]', or save the table as .csv"
        ) from error
    data = _bytes_of(path)
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise DataError(
            f"{path}: is encrypted, or a table of Excel 97; save it as .xlsx without a password, or as .csv"
        )
    with refusing_damage(DataError, f"{path}: cannot be read as an Excel table ({{reason}}); save it again"):
        book = load_workbook(io.BytesIO(data), read_only=True, data_only=True, keep_links=False)
        if sheet is not None and sheet not in book.sheetnames:
            near = did_you_mean(sheet, book.sheetnames)
            raise DataError(f"{path}: has no sheet '{sheet}'{near}; sheets: {', '.join(book.sheetnames)}")
        page = book[sheet] if sheet is not None else book.worksheets[0]
        page.reset_dimensions()  # some programs write wrong ones
        for number, values in enumerate(page.iter_rows(values_only=True), 1):
            cells = [_text_of(value) for value in values]
            if any(cells):
                yield number, cells
        book.close()


def _text_of(value: Any) -> str:
    """A cell of Excel, or a number of JSON, as the text that a person sees."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value.isoformat() if hasattr(value, "isoformat") else value).strip()


def _with_columns(path: Path, cells: Cells, place: str) -> Spreadsheet:
    rows = iter(cells)
    number, first = next(rows, (0, []))
    if not first:
        raise DataError(f"{path}: got no row, expected names of columns and a row for each image")
    named = not any(image_ending(cell.strip()) for cell in first)
    columns = _names(first) if named else [f"column {place + 1}" for place in range(len(first))]
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise DataError(f"{path}:{place}{number}: two columns are named '{twice[0]}'; give each its own name")
    listed = ", ".join(columns)
    found = []
    for line, values in rows if named else [(number, first), *rows]:
        where = f"{path}:{place}{line}"
        while len(values) > len(columns) and not values[-1].strip():
            values.pop()
        if place:  # Excel leaves out blank cells at the end of a row
            values += [""] * (len(columns) - len(values))
        if len(values) != len(columns):
            start = " | ".join(values)[:60]
            raise DataError(
                f"{where}: got {len(values)} cells ('{start}'), expected {len(columns)}: {listed}; a text that holds "
                "the delimiter or a line end has to be in double quotes"
            )
        found.append(Row(where, {name: v.strip() for name, v in zip(columns, values, strict=True) if v.strip()}))
    return Spreadsheet(columns, found)


def _names(cells: list[str]) -> list[str]:
    names = [" ".join(cell.split()) or f"column {number}" for number, cell in enumerate(cells, 1)]
    while len(names) > 1 and not cells[len(names) - 1].strip():
        names.pop()  # blank columns behind the last named one
    return names


# ── JSON ──


def _from_json(path: Path, ending: str) -> Spreadsheet:
    if ending == ".jsonl":
        found = [row for _, row in read_rows(path)]
    else:
        value = read_json(path)
        found = [Row(str(path), item, f"[{number}]") for number, item in enumerate(_list_in(value, path))]
    columns = list(dict.fromkeys(field for row in found for field in row.fields()))
    if not columns:
        raise DataError(f"{path}: got no row with fields, expected an object for each image")
    return Spreadsheet(columns, [_plain(row) for row in found])


def _list_in(value: Any, path: Path) -> list[Any]:
    """The rows of a JSON file: a list, the one list of objects in an object, or {name of an image: text or texts}."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
        if len(lists) == 1:
            return lists[0]
        if value and all(isinstance(item, str) or _is_texts(item) for item in value.values()):
            return [{"image": name, "caption": texts} for name, texts in value.items()]
    raise DataError(f"{path}: got a JSON {type(value).__name__}, expected a list of objects, one for each row")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _plain(row: Row) -> Row:
    """A row of JSON with numbers as texts; fields that are no text or list of texts are left as they are."""
    values: dict[str, Any] = {}
    for field in row.fields():
        value = row.value_or_none(field)
        if isinstance(value, (int, float)):
            value = _text_of(value)
        elif isinstance(value, list):
            value = [_text_of(item) if isinstance(item, (int, float)) else item for item in value]
        if value is not None and value != "":
            values[field] = value
    return Row(row.where, values)
