"""Shared by the commands: arguments, output of results, messages about skipped images."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frozenprefix.errors import DataError

if TYPE_CHECKING:
    from rich.table import Column

    from frozenprefix.data.images import BadImages

Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder or Hub id.", show_default=False)
]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to it: training.learning_rate=1e-4", show_default=False),
]
Prompt = Annotated[str | None, typer.Option(help="Text before the caption; by default the prompt of the training.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest text, in tokens.")]
LanguageModel = Annotated[
    str | None,
    typer.Option(
        metavar="PATH", help="Present path of the checkpoint's language model; by default the one in the checkpoint."
    ),
]


class Arithmetic(str, Enum):
    """What frozen parts compute in."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


Precision = Annotated[Arithmetic, typer.Option(help="What frozen parts compute in; auto: the faster of fp32 and bf16.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output file that this command did not write.")]


def not_nan(value: float) -> float:
    """Refuse a value that is not a number, which older releases of typer take to be in every range."""
    if math.isnan(value):
        raise typer.BadParameter("got nan, expected a number")
    return value


def is_main_process() -> bool:
    """Whether this is the process that prints; accelerate and torchrun number processes by RANK."""
    return os.environ.get("RANK", "0") == "0"


def check_files(paths: Sequence[Path], name: str) -> None:
    """Raise `DataError` naming every path that is not a file."""
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        expected = "an image file that exists" if len(paths) == 1 else "image files that exist"
        raise DataError(f"{name}: got {', '.join(map(repr, missing))}, expected {expected}")


def list_images(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as the images in them, however deep; each image once.

    Raises:
        DataError: naming every path that is not there, or a folder without images.

    Example:
        >>> len(list_images([images_folder, image_path]))
        12
    """
    from frozenprefix.data.images import find_images

    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise DataError(f"PATH: got {', '.join(missing)}, which {'does' if len(missing) == 1 else 'do'} not exist")
    images: dict[Path, None] = {}
    for path in paths:
        images.update(dict.fromkeys(find_images(path) if path.is_dir() else [path]))
    return list(images)


def write_json(path: Path | None, value: Any) -> None:
    """Write a result, if a file for it is named."""
    from frozenprefix.utils import write_text_atomic

    if path is not None:
        write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_table(columns: Sequence[str | Column], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Print a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_left_out(bad: BadImages, where: str, total: int) -> None:
    """Name every image that could not be read, and count them, on standard error."""
    from frozenprefix.utils import summary

    for _, error in bad:
        typer.secho(shown(f"left out, {error.reason}: {error}"), fg=typer.colors.RED, err=True)
    if len(bad):
        typer.secho(summary(where, total, bad.counts, what="images"), fg=typer.colors.RED, err=True)


def counted(counts: Mapping[str, int]) -> str:
    """Counts by name in one line; "none" without any."""
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def shown(name: object) -> str:
    """A path or another name for one line of the screen, with escapes in place of line ends and control characters."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(name))


def one_line(text: str) -> str:
    """A text for one line of the screen: line breaks become spaces, and other control characters go."""
    return "".join(char for char in " ".join(text.split()) if char.isprintable())
