"""`frozenprefix export`: files for other engines, compared with the checkpoint before the command ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frozenprefix.cli.common import Checkpoint, LanguageModel, MaxNewTokens, Prompt
from frozenprefix.errors import DataError

if TYPE_CHECKING:
    from frozenprefix.export import Source, Verification

app = typer.Typer(help="Write a checkpoint for another engine, and compare both.", no_args_is_help=True)

Out = Annotated[Path, typer.Option(help="Folder to write; it must not exist, or be empty.", show_default=False)]
Verify = Annotated[
    list[Path] | None,
    typer.Option(metavar="IMAGE", help="Image to compare both engines on; may be repeated. Two drawings by default."),
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Write the files without running them.")]


class FileType(str, Enum):
    """What matrices are stored in."""

    f32 = "f32"
    f16 = "f16"


@app.command("llava")
def llava(
    checkpoint: Checkpoint,
    out: Out,
    verify: Verify = None,
    no_verify: NoVerify = False,
    language_model: LanguageModel = None,
    max_new_tokens: MaxNewTokens = 30,
) -> None:
    """A folder for transformers' Llava classes. Exit code 1 if greedy texts differ."""
    source = _open(checkpoint, out, verify, language_model)
    from frozenprefix.export import export_llava, verify_llava

    export_llava(source, out)
    typer.echo(f"{out}: for LlavaForConditionalGeneration and LlavaProcessor of transformers")
    _report(verify_llava, source, out, verify, no_verify, max_new_tokens)


@app.command("gguf")
def gguf(
    checkpoint: Checkpoint,
    out: Out,
    verify: Verify = None,
    no_verify: NoVerify = False,
    file_type: Annotated[FileType, typer.Option(help="What matrices are stored in.")] = FileType.f32,
    only_language_model: Annotated[
        bool,
        typer.Option(
            "--only-language-model",
            help="Write it alone, for `caption --engine llama.cpp` with any encoder and mapper.",
        ),
    ] = False,
    language_model: LanguageModel = None,
    max_new_tokens: MaxNewTokens = 30,
) -> None:
    """Two files for llama.cpp: language model, and encoder with mapper. Exit code 1 if greedy texts differ."""
    source = _open(checkpoint, out, verify, language_model)
    from frozenprefix.export import export_gguf, verify_gguf

    if only_language_model:
        export_gguf(source, out, file_type.value, only_language_model=True)
        typer.echo(f"{out}: language_model.gguf for `frozenprefix caption --engine llama.cpp --language-model`")
        return
    if not no_verify:
        from frozenprefix.inference.llama_cpp.library import llama_cpp

        llama_cpp()  # before anything is written
    export_gguf(source, out, file_type.value)
    typer.echo(f"{out}: language_model.gguf and mmproj.gguf for llama.cpp")
    _report(verify_gguf, source, out, verify, no_verify, max_new_tokens)


@app.command("embeds")
def embeds(
    checkpoint: Checkpoint,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE", help="Images, and folders of them.", show_default=False)
    ],
    out: Out,
    prompt: Prompt = None,
    language_model: LanguageModel = None,
    max_new_tokens: MaxNewTokens = 30,
) -> None:
    """Prefix embeddings of images, for any engine that takes embeddings; also as vLLM's requests."""
    from frozenprefix.cli.common import list_images

    files = list_images(images)
    source = _open(checkpoint, out, None, language_model)
    from frozenprefix.export import export_embeds

    export_embeds(source, files, out, prompt=prompt, max_new_tokens=max_new_tokens)
    typer.echo(f"{out}: embeds.safetensors with {len(files)} images, prompt_embeds/*.pt and requests.jsonl for vLLM")


def _open(checkpoint: str, out: Path, verify: Sequence[Path] | None, language_model: str | None) -> Source:
    """Check the arguments, then load the checkpoint."""
    from frozenprefix.assets import check_checkpoint
    from frozenprefix.cli.common import check_files

    check_checkpoint(checkpoint)
    check_new_folder(out)
    check_files(list(verify or []), "--verify")
    from frozenprefix.export import Source
    from frozenprefix.utils.images import to_image

    for path in verify or []:
        to_image(path)  # an image that cannot be read ends the command before anything is written

    return Source.load(checkpoint, language_model)


def check_new_folder(out: Path) -> None:
    """Refuse a folder with something in it, which an export would replace.

    Raises:
        DataError: naming it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"--out: '{out}' exists; give a new or empty folder")


def _report(
    verify: Callable[..., list[Verification]], source: Source, out: Path, images: Any, skip: bool, max_new_tokens: int
) -> None:
    """Run both engines and print one line per image."""
    if skip:
        typer.echo("not verified: the files were not run")
        return
    results = verify(source, out, images or (), max_new_tokens)
    for result in results:
        typer.echo(str(result))
    different = sum(result.first_difference is not None for result in results)
    largest = max(result.error for result in results)
    typer.echo(f"{len(results) - different} of {len(results)} greedy texts are equal; largest error {largest:.1e}")
    if different:
        raise typer.Exit(1)
