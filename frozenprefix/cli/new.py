"""`frozenprefix new`."""

from __future__ import annotations

import shlex
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frozenprefix.cli.common import one_line
from frozenprefix.cli.train import say_stages
from frozenprefix.errors import DataError, FrozenPrefixError

if TYPE_CHECKING:
    from frozenprefix.data.survey import Survey


class Texts(str, Enum):
    """Where the texts are."""

    auto = "auto"
    table = "table"
    files = "files"
    folders = "folders"


def command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of photos.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Recipe to write.", show_default="FOLDER's name.yaml")] = None,
    texts: Annotated[
        Texts, typer.Option(help="Where texts are: a table, .txt files beside the images, or folders as labels.")
    ] = Texts.auto,
    table: Annotated[
        Path | None, typer.Option(help="The table: .csv, .tsv, .xlsx, .json or .jsonl.", show_default="found")
    ] = None,
    image: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column that names the images.")] = None,
    caption: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Column of captions; may be given several times.")
    ] = None,
    question: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of questions.")] = None,
    answer: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Column of answers; may be given several times.")
    ] = None,
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of labels.")] = None,
    split: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of train and val.")] = None,
    encoding: Annotated[str | None, typer.Option(help="Of a text table, such as cp1252.", show_default="found")] = None,
    delimiter: Annotated[str | None, typer.Option(help="Of a text table.", show_default="found")] = None,
    sheet: Annotated[str | None, typer.Option(help="Of an Excel table.", show_default="the first")] = None,
    validation: Annotated[
        float | None,
        typer.Option(min=0.01, max=0.9, help="Share of images for validation.", show_default="0.2 of few, 0.1 of many"),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--plan/--no-plan", help="Measure how long training takes here; fetches the models.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a recipe that is there.")] = False,
) -> None:
    """Look at a folder of photos with captions, and write a recipe for it.

    Captions, questions with answers, or labels come from a table with a row for each text (CSV, Excel, JSON; columns of
    any name), from a .txt beside each photo, or from folders. Nothing is asked; options override what is guessed.
    """
    if not folder.is_dir():
        raise DataError(f"FOLDER: got '{folder}', expected a folder of photos")
    name = folder.resolve().name or "photos"
    path = out or Path(f"{name.replace(' ', '_')}.yaml")
    if path.exists() and not force:
        raise DataError(f"--out: '{path}' exists; choose another file, or give --force to replace it")
    from frozenprefix.config.starting import starting_recipe
    from frozenprefix.data.survey import survey
    from frozenprefix.utils import progress_bar, write_text_atomic

    columns: dict[str, Any] = {
        "image": image,
        "captions": _one(caption),
        "question": question,
        "answers": _one(answer),
        "label": label,
        "split_column": split,
        "encoding": encoding,
        "delimiter": delimiter,
        "sheet": sheet,
    }
    with progress_bar("looking at the images"):
        found = survey(folder, texts_from=texts.value, table=table, columns=columns, validation=validation)
    output_dir = Path("runs") / path.stem
    recipe = starting_recipe(found, name=name, file=shlex.quote(str(path)), output_dir=output_dir)
    for line in found.found:
        typer.echo(one_line(line))
    for line in found.notes:
        typer.secho(f"note: {one_line(line)}", fg=typer.colors.YELLOW)
    write_text_atomic(path, recipe)
    typer.echo(f"wrote {path}")
    if measure:
        _say_time(path)
    _say_next(path, output_dir, folder, found)


def _one(names: list[str] | None) -> str | list[str] | None:
    return names[0] if names and len(names) == 1 else names or None


def _say_time(path: Path) -> None:
    """How long training takes; a machine that cannot tell has its recipe all the same."""
    from frozenprefix.config import load_recipe

    try:
        say_stages(load_recipe(path), measure=True)
    except FrozenPrefixError as error:
        typer.secho(f"note: the time is not known: {one_line(str(error))}", fg=typer.colors.YELLOW)


def _say_next(path: Path, output_dir: Path, folder: Path, found: Survey) -> None:
    quoted, best = shlex.quote(str(path)), shlex.quote(str(output_dir / "best"))
    steps = [f"frozenprefix train {quoted}"]
    if found.task == "vqa":
        steps.append(f'frozenprefix ask {best} PHOTO.jpg "a question"')
        steps.append(f"frozenprefix evaluate {best} --task vqa")
    elif found.task == "classification":
        steps.append(f"frozenprefix evaluate {best} --task classification")
    else:
        steps.append(f"frozenprefix caption {best} {shlex.quote(str(folder))} --out captions.csv")
    steps.append(f"frozenprefix report {shlex.quote(str(output_dir))}")
    typer.echo("next:")
    for step in steps:
        typer.echo(f"  {step}")
