"""`frozenprefix import`: mappers that others trained become checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from frozenprefix.errors import ConfigError

app = typer.Typer(help="Make a checkpoint of a mapper that others trained.", no_args_is_help=True)

File = Annotated[
    Path, typer.Argument(metavar="FILE", help="State dict: .pt, .bin or .safetensors.", show_default=False)
]
Out = Annotated[Path, typer.Option(help="Folder to write; it must not exist, or be empty.", show_default=False)]
Encoder = Annotated[
    str | None,
    typer.Option(
        metavar="SECTION",
        help="The encoder as in a recipe: '{source: open_clip, name: ViT-B-32, weights: vit.pt, output: pooled}'.",
        show_default=False,
    ),
]
Required = Annotated[
    str,
    typer.Option(
        metavar="SECTION", help="The encoder as in a recipe, with the layer that is read.", show_default=False
    ),
]
Model = Annotated[str, typer.Option(metavar="PATH", help="Hub id or folder of the language model.", show_default=False)]


@app.command("clipcap")
def clipcap(
    file: File,
    out: Out,
    vision_encoder: Encoder = None,
    language_model: Annotated[
        str, typer.Option(metavar="PATH", help="The GPT-2 that the training began with: Hub id or folder.")
    ] = "gpt2",
    unit_features: Annotated[
        bool, typer.Option("--unit-features", help="It was trained with --normalize_prefix.")
    ] = False,
) -> None:
    """A checkpoint of ClipCap's training script: MLP or transformer, frozen or fine-tuned GPT-2."""
    _check(out)
    from frozenprefix.export import import_clipcap

    section = None if vision_encoder is None else _section(vision_encoder)
    model = import_clipcap(
        file, out, vision_encoder=section, language_model=language_model, unit_features=unit_features
    )
    own = (out / "language_model").is_dir()
    _report(out, model, "GPT-2 was fine-tuned, and is part of the checkpoint" if own else "GPT-2 is frozen")


@app.command("llava")
def llava(file: File, out: Out, vision_encoder: Required, language_model: Model) -> None:
    """LLaVA's mm_projector.bin, linear or MLP."""
    _check(out)
    from frozenprefix.export import import_llava

    model = import_llava(file, out, vision_encoder=_section(vision_encoder), language_model=language_model)
    _report(out, model)


@app.command("nanovlm")
def nanovlm(file: File, out: Out, vision_encoder: Required, language_model: Model) -> None:
    """nanoVLM's modality projector."""
    _check(out)
    from frozenprefix.export import import_nanovlm

    model = import_nanovlm(file, out, vision_encoder=_section(vision_encoder), language_model=language_model)
    _report(out, model)


def _check(out: Path) -> None:
    from frozenprefix.cli.export import check_new_folder

    check_new_folder(out)


def _section(text: str) -> dict[str, Any]:
    """Fields of an encoder's section from YAML."""
    from frozenprefix.config.yaml import read_yaml

    fields = read_yaml(text, "--vision-encoder")
    if not isinstance(fields, dict):
        raise ConfigError(f"--vision-encoder: got {text!r}, expected fields such as '{{source: timm, name: resnet18}}'")
    return fields


def _report(out: Path, model: Any, more: str = "") -> None:
    mapper = model.config.mapper
    typer.echo(f"{out}: mapper '{mapper.type}' with prefix length {mapper.prefix_length}{'; ' if more else ''}{more}")
