"""`frozenprefix data ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from frozenprefix.cli import data_audit
from frozenprefix.cli.common import Force, counted, is_main_process, write_json

app = typer.Typer(help="Look at data sets.", no_args_is_help=True)
app.command("audit")(data_audit.command)


@app.callback()
def _group() -> None:
    """Sub-commands."""


@app.command()
def check(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of the data.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="JSON file to write the whole report to.")] = None,
    force: Force = False,
) -> None:
    """Read every image once; report broken images and images in two splits. Exit code 1 if there are any.

    The exit code is also 1 for a folder without targets that holds tables which no source reads.
    """
    from frozenprefix.utils import check_output, progress_bar

    if out is not None:
        check_output(out, {"samples", "images", "bad_images", "leaks"}, force=force)
    from frozenprefix.data.check import check_samples
    from frozenprefix.data.sources import detect_sources, load_sources, unread_tables

    samples = load_sources(detect_sources(folder))
    with progress_bar("reading images") as update:
        report = check_samples(samples, progress=update)
    result = report.to_dict()
    write_json(out, result)
    for name, value in result.items():
        for line in _lines(name, value):
            typer.echo(line)
    tables = [] if report.targets else unread_tables(folder)
    for table in tables:
        typer.echo(f"texts that may be in it are not read: {table}")
    if report.bad_images or report.leaks or tables:
        raise typer.Exit(1)


@app.command()
def build(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE... OUT", help="Folders of data, or recipes; then the folder to write."),
    ],
    split: Annotated[str | None, typer.Option(help="Split of the folders to write; all when not given.")] = None,
    images_per_shard: Annotated[int, typer.Option(min=1, help="Images of a shard.")] = 1000,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read and decode images.")] = 2,
    recipe: Annotated[
        Path | None, typer.Option(help="Write features of this recipe's encoder in place of images.")
    ] = None,
    max_bad_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of bad images from which the command stops.")
    ] = 0.01,
) -> None:
    """Write images with their texts as shards, to be streamed in training. Run it again to go on after a kill.

    A shard is a tar in img2dataset's layout (KEY.jpg, KEY.txt, KEY.json) with an index. Several processes that
    `torchrun` starts share the shards.
    """
    from frozenprefix.errors import ConfigError
    from frozenprefix.utils import progress_bar, summary

    if len(paths) < 2:
        raise ConfigError(f"data build: got {len(paths)} paths, expected one or more sources and the folder to write")
    *sources, out = paths
    encoder = None if recipe is None else _shard_encoder(recipe)
    from frozenprefix.data.streaming.build import build_shards, open_all

    groups = open_all([config for source in sources for config in _configs(source, split)])
    with progress_bar("writing shards", enabled=is_main_process()) as update:
        built = build_shards(
            groups,
            Path(out),
            images_per_shard=images_per_shard,
            workers=workers,
            encoder=encoder,
            max_bad_share=max_bad_share,
            progress=update,
        )
    if is_main_process():
        typer.echo(f"folder: {out}")
        typer.echo(f"shards: {built.shards}, {built.written} written now; images: {built.images}")
        if built.left_out:
            total = built.images + sum(built.left_out.values())
            typer.echo(summary(out, total, built.left_out, what="images", examples=["bad_images.jsonl"]))
        typer.echo(f"train with: {{type: webdataset, path: {out}, stream: true}}")


def _configs(source: str, split: str | None) -> list[dict[str, Any]]:
    """The sources of a recipe, or those detected in a folder."""
    if source.endswith((".yaml", ".yml")):
        from frozenprefix.config import load_recipe

        return load_recipe(Path(source)).data.train
    from frozenprefix.data.sources import detect_sources

    detected = detect_sources(source)
    return [config if split is None else {**config, "split": split} for config in detected]


def _shard_encoder(recipe: Path) -> Any:
    from frozenprefix.config import load_recipe, resolve_precision

    loaded = resolve_precision(load_recipe(recipe))
    from frozenprefix.data.image_encoder import ImageEncoder
    from frozenprefix.data.streaming.build import ShardEncoder

    return ShardEncoder(ImageEncoder.from_config(loaded.model.vision_encoder), loaded.data.feature_dtype)


@app.command()
def show(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder of data or shards, or a recipe.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("samples.html"),
    samples: Annotated[int, typer.Option(min=1, help="Images on the page.")] = 48,
    seed: Annotated[int, typer.Option(help="Of the choice of images.")] = 0,
    split: Annotated[str | None, typer.Option(help="Split of a folder; all when not given.")] = None,
    force: Force = False,
) -> None:
    """Write an HTML page of random images with their texts. It needs no other file and no network."""
    from frozenprefix.utils import check_output

    check_output(out, (), force=force)
    from frozenprefix.data.streaming.build import open_all
    from frozenprefix.interpret.samples import write_samples

    groups = open_all(_configs(source, split))
    shown = write_samples(out, groups, title=source, images=samples, seed=seed)
    typer.echo(f"{shown} of {len(groups)} images: {out}")


def _lines(name: str, value: Any) -> list[str]:
    label = name.replace("_", " ")
    if isinstance(value, dict):
        return [f"{label}: {counted(value)}"]
    if isinstance(value, list):
        return [f"  {label}: {_example(item)}" for item in value]
    return [f"{label}: {value:.2f}" if isinstance(value, float) else f"{label}: {value}"]


def _example(item: Any) -> str:
    if isinstance(item, dict):
        return f"{item['image']} ({item['split']}) and {item['other']} ({item['other_split']})"
    return str(item)
