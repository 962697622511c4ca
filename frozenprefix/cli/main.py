"""The command line. Commands import what they need when they run, so that `--help` is quick."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from frozenprefix.cli import (
    ask,
    cache,
    caption,
    card,
    chat,
    compare,
    data,
    demo,
    doctor,
    evaluate,
    explain,
    export,
    import_,
    new,
    plan,
    report,
    search,
    train,
    video,
)
from frozenprefix.errors import ConfigError, FrozenPrefixError
from frozenprefix.registry import allow_code
from frozenprefix.version import __version__

_ALLOW_CODE = "--allow-code"
_HOME = re.compile(r"^((?:--)?[\w.-]+=|)(~(?=/).*)", re.DOTALL)


class _Group(TyperGroup):
    """Shows the package's own errors and those of the file system as a message; others are bugs, with a traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if _ALLOW_CODE in args:  # may follow any command
            args = [_ALLOW_CODE, *(argument for argument in args if argument != _ALLOW_CODE)]
        # shells do not expand ~ after the = of --out=~/captions.jsonl and output_dir=~/run
        args = [_HOME.sub(lambda match: match[1] + os.path.expanduser(match[2]), argument) for argument in args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FrozenPrefixError as error:
            if os.environ.get("FROZENPREFIX_DEBUG") == "1":
                raise
            typer.secho(_message(error), fg=typer.colors.RED, err=True)
            raise typer.Exit(error.exit_code) from error
        except (MemoryError, RuntimeError) as error:
            from frozenprefix.utils import is_out_of_memory

            reason = next(iter(str(error).splitlines()), "")
            if os.environ.get("FROZENPREFIX_DEBUG") == "1" or not is_out_of_memory(error):
                raise
            fix = "take smaller batches, or a shorter prefix; `frozenprefix plan RECIPE` predicts the memory of a step"
            typer.secho(f"Error: out of memory ({reason}); {fix}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from error
        except OSError as error:  # a full disk, a folder that may not be written, a file that is gone
            if os.environ.get("FROZENPREFIX_DEBUG") == "1" or (error.filename is None and error.errno is None):
                raise
            place = "" if error.filename is None else f"'{error.filename}': "
            typer.secho(f"Error: {place}{error.strerror or error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Group,
    help="Give a frozen language model eyes: train a mapper, caption images, answer questions about them.",
    epilog="Your own photos: frozenprefix new FOLDER. What is installed, and what is missing: frozenprefix doctor.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("new")(new.command)
app.command("train")(train.command)
app.command("cache")(cache.command)
app.command("plan")(plan.command)
app.command("caption")(caption.command)
app.command("ask")(ask.command)
app.command("chat")(chat.command)
app.command("video")(video.command)
app.command("demo")(demo.command)
app.command("evaluate")(evaluate.command)
app.command("search")(search.command)
app.command("explain")(explain.command)
app.command("compare")(compare.command)
app.command("report")(report.command)
app.command("card")(card.command)
app.command("doctor")(doctor.command)
app.add_typer(data.app, name="data")
app.add_typer(export.app, name="export")
app.add_typer(import_.app, name="import")


def _message(error: FrozenPrefixError) -> str:
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        return "\n  ".join([f"Error: {len(error.problems)} problems", *error.problems])
    return f"Error: {error}"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"frozenprefix {__version__}")
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    allow: Annotated[
        bool,
        typer.Option(_ALLOW_CODE, help="Run code that a recipe or checkpoint names as package.module:Class."),
    ] = False,
) -> None:
    import sys

    from frozenprefix.utils.log import show_log

    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr] # file names that are not UTF-8
    if allow:
        allow_code()
    show_log()


if __name__ == "__main__":
    app()
