"""`frozenprefix chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frozenprefix.cli.common import Arithmetic, Checkpoint, LanguageModel, MaxNewTokens, Precision, check_files, not_nan
from frozenprefix.errors import DataError, FrozenPrefixError

if TYPE_CHECKING:
    from rich.console import Console

    from frozenprefix.inference import Dialog

HELP = "/image PATH adds an image to the next message, /reset forgets everything, /quit ends."


def command(
    checkpoint: Checkpoint,
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="[IMAGE]...", help="Images of the first message.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message, where the LM's template takes one.")] = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Annotated[
        float, typer.Option(min=0, callback=not_nan, help="0 takes the likeliest word, more samples.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, callback=not_nan, help="Share of probability that is sampled from.")
    ] = 1.0,
    language_model: LanguageModel = None,
    precision: Precision = Arithmetic.auto,
) -> None:
    """Talk about images. Lines are messages; /image PATH, /reset and /quit are commands."""
    from frozenprefix.assets import check_checkpoint

    check_checkpoint(checkpoint)
    check_files(images or [], "IMAGE")
    from frozenprefix.data.images import load_image

    for image in images or []:
        load_image(image)  # fails now, before the model is loaded
    from rich.console import Console

    from frozenprefix.inference import Dialog

    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}
    chat = _Chat(
        Dialog.from_pretrained(checkpoint, system=system, language_model=language_model, precision=precision.value),
        Console(highlight=False),
        list(images or []),
        {"max_new_tokens": max_new_tokens, **sampling},
    )
    chat.run()


class _Chat:
    """Reads lines until the input ends.

    Args:
        images: for the next message.
        options: of every reply.
    """

    def __init__(self, dialog: Dialog, console: Console, images: list[Path], options: dict[str, Any]):
        self.dialog, self.console, self.images, self.options = dialog, console, images, options

    def run(self) -> None:
        interactive = sys.stdin.isatty()
        if interactive:
            self.console.print(HELP, style="dim")
        while True:
            try:
                line = self.console.input("[bold]> [/]" if interactive else "").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line == "/quit":
                return
            try:
                self.read(line)
            except FrozenPrefixError as error:  # a refused message does not end the conversation
                typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)

    def read(self, line: str) -> None:
        """Do what one line asks for."""
        name, _, argument = line.partition(" ")
        if name == "/image":
            self.add(Path(argument.strip()).expanduser())
        elif name == "/reset":
            self.dialog.reset()
            self.images = []
        elif name.startswith("/"):
            raise DataError(f"got the command {name}; {HELP}")
        elif line:
            self.say(line)

    def add(self, path: Path) -> None:
        from frozenprefix.data.images import load_image

        load_image(path)  # fails now, before a message is typed
        self.images.append(path)

    def say(self, line: str) -> None:
        pieces = self.dialog.stream(line, self.images, **self.options)
        self.images = []
        try:
            for piece in pieces:
                self.console.print(piece, end="", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined] # a generator, which ends the reply
        self.console.print()
