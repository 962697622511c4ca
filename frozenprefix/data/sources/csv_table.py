"""A table beside a folder of images: a spreadsheet with an image and its text, question or label in each row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from frozenprefix.data.samples import Sample
from frozenprefix.data.sources.base import SourceConfig
from frozenprefix.data.sources.columns import ROLES, columns_fit, find_columns, sample_of_row
from frozenprefix.data.sources.guessing import Guess, guess_columns
from frozenprefix.data.sources.image_names import ImageNames
from frozenprefix.data.sources.rows import Row
from frozenprefix.data.sources.spreadsheets import Spreadsheet, read_spreadsheet
from frozenprefix.errors import DataError
from frozenprefix.utils import report_left_out
from frozenprefix.utils.caption_files import FIELDS


class CsvSource(SourceConfig):
    """Rows of a CSV, TSV, Excel, JSON or JSON-lines table, with columns of any name and several rows per image.

    The kind of table is told by the ending of its name; delimiter and encoding are found out. Columns that are not
    named are guessed by their names and contents (`frozenprefix new` shows the guess). The image of a row is found by
    name among all images under `images`: with or without ending and folders, also by a path of another machine, or a
    name that an export has changed (`IMG_1-2.jpg` for `IMG_1`). All captions of an image make one sample; every
    question is a sample of its own. Rows without an image, a question or a label are left out and counted; an
    image that is not there is counted as missing when images are read.

    Example:
        >>> _ = (tmp_path / "t.csv").write_text("Photo;Text\\nred_circle;a red circle\\nred_circle.png;a circle\\n")
        >>> source = CsvSource(path=str(tmp_path), file="t.csv", images=str(images_folder))
        >>> [sample.targets for sample in source.read(tmp_path)]
        [('a red circle', 'a circle')]
    """

    type: Literal["csv"] = "csv"
    file: str = Field(description="the table's place under `path`: .csv, .tsv, .xlsx, .json or .jsonl")
    images: str = Field(".", description="folder under `path` that holds the images, however deep")
    image: str | None = Field(None, description="column that names the image; guessed when not given")
    captions: str | list[str] | None = Field(None, description="column(s) of captions")
    question: str | None = Field(None, description="column of the question; needs `answers`")
    answers: str | list[str] | None = Field(None, description="column(s) of the answers; the commonest is the target")
    label: str | None = Field(None, description="column of the label, for task 'classification'")
    split_column: str | None = Field(None, description="column of the split, from which `split` chooses")
    delimiter: str | None = Field(None, description="between the cells of a text table; found out when not given")
    encoding: str | None = Field(None, description="of a text table: utf-8, utf-16, cp1252, …; found out if not given")
    sheet: str | None = Field(None, description="of a workbook; the first one when not given")

    @model_validator(mode="after")
    def _columns_fit(self) -> CsvSource:
        captions, answers = (str(value) if value else None for value in (self.captions, self.answers))
        if not columns_fit(captions, self.question, answers, self.label):
            raise ValueError("expected `captions`, or `question` and `answers`, or `label`")
        return self

    def read(self, root: Path) -> list[Sample]:
        path = root / self.file
        table = read_spreadsheet(path, delimiter=self.delimiter, encoding=self.encoding, sheet=self.sheet)
        names = ImageNames(root / self.images)
        guess = self.guess(table, names, str(path))
        roles = {"image": [guess.image], **guess.texts}
        without: Counter[str] = Counter()
        samples: dict[Any, Sample] = {}
        for number, row in enumerate(table.rows, 1):
            reason = next((f"no {role}" for role in ("image", "question", "label") if _lacks(row, roles, role)), None)
            if reason:
                without[reason] += 1
                continue
            image = self._image(row, guess.image, names)
            split = row.text(self.split_column) if self.split_column and self.split_column in row else None
            sample = _sample(row, guess.texts, f"{row.text(guess.image)}#{number}", image, split)
            key = (image, split) if sample.task == "caption" else number
            samples[key] = _joined(samples[key], sample) if key in samples else sample
        report_left_out(path, len(table.rows), without, fix="name the columns in the recipe")
        return list(samples.values())

    def guess(self, table: Spreadsheet, names: ImageNames, where: str) -> Guess:
        """The columns of a table: those that this config names, and a guess at the others.

        Raises:
            DataError: a column is not there, or cannot be guessed.
        """
        named = {role: value for role in ROLES if (value := getattr(self, role))}
        texts = {role: [value] if isinstance(value, str) else value for role, value in named.items()}
        for role, columns in {**texts, "split_column": [self.split_column or table.columns[0]]}.items():
            for column in columns:
                find_columns(table.columns, self.image or table.columns[0], {role: column}, where)
        guess = guess_columns(
            table.columns, table.rows, lambda cell: is_there(names, cell), where, image=self.image, texts=texts
        )
        return guess if self.split_column is None else replace(guess, split=self.split_column)

    def _image(self, row: Row, column: str, names: ImageNames) -> Path:
        name = row.text(column)
        try:
            found = names.find(name)
        except DataError as error:
            raise DataError(f"{row.where}: column '{column}': {error}") from error
        if found is None and Path(name).is_absolute() and Path(name).is_file():
            return Path(name)  # of this machine, elsewhere
        return found or names.folder / name.replace("\\", "/").lstrip("/")


class FittedTable(NamedTuple):
    """A table whose columns are known.

    Attributes:
        found: rows whose image is there; config: the source, with all its columns; lines: for people.
    """

    found: int
    config: dict[str, Any]
    lines: list[str]


def fit_table(config: dict[str, Any], names: ImageNames, file: Path) -> FittedTable:
    """Read a table, and name the columns that `config` leaves open.

    Raises:
        DataError: the table is damaged, or its columns cannot be guessed; for a table of `frozenprefix caption`.

    Example:
        >>> _ = (tmp_path / "t.csv").write_text("Photo;Text\\nred_circle;a red circle\\n")
        >>> config = {"type": "csv", "path": str(tmp_path), "file": "t.csv"}
        >>> fit_table(config, ImageNames(images_folder), tmp_path / "t.csv").config["captions"]
        'Text'
    """
    source, config = CsvSource.model_validate(config), dict(config)
    table = read_spreadsheet(file, delimiter=source.delimiter, encoding=source.encoding, sheet=source.sheet)
    if tuple(table.columns) == FIELDS:
        raise DataError(f"{file}: was written by `frozenprefix caption`; name a table that people wrote")
    guess = source.guess(table, names, str(file))
    config["image"] = guess.image
    cells = [row.text(guess.image) for row in table.rows if guess.image in row]
    found = sum(is_there(names, cell) for cell in cells)
    lines = [f"{file.name}: {len(table.rows)} rows, columns {', '.join(table.columns)}"]
    lines.append(f"column '{guess.image}' names the images: {found} of {len(cells)} are there")
    for role, columns in guess.texts.items():
        lines.append(f"column{'s' * (len(columns) > 1)} {', '.join(map(repr, columns))}: {role}")
        config[role] = columns[0] if len(columns) == 1 else columns
    if guess.split is not None:
        config["split_column"] = guess.split
        lines.append(f"column '{guess.split}': split")
    return FittedTable(found, config, lines)


def is_there(names: ImageNames, cell: str) -> bool:
    """Whether a cell names an image, or several."""
    try:
        return names.find(cell) is not None
    except DataError:
        return True


def _lacks(row: Row, roles: dict[str, list[str]], role: str) -> bool:
    return role in roles and not any(column in row for column in roles[role])


def _sample(row: Row, roles: Mapping[str, list[str]], name: str, image: Path, split: str | None) -> Sample:
    """The sample of a row, with the texts of all columns of a role."""
    values = {}
    for role, columns in roles.items():
        texts = tuple(text for column in columns if column in row for text in row.texts(column) if text.strip())
        values[role] = texts[0] if role in ("question", "label") and texts else list(texts)
    return sample_of_row(Row(row.where, values), {role: role for role in values}, name, (image,), split)


def _joined(first: Sample, other: Sample) -> Sample:
    return replace(first, targets=first.targets + other.targets)
