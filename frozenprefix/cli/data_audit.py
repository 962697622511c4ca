"""`frozenprefix data audit`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frozenprefix.cli.common import Force, Overrides, RecipeFile, one_line, shown, write_json

if TYPE_CHECKING:
    from frozenprefix.data.samples import Sample
    from frozenprefix.inference import AuditedCaption


def command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Model that judges captions: folder or Hub id; by default the recipe's own, if trained."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Judge the captions of the first N images.")] = None,
    others: Annotated[int, typer.Option(min=1, help="Other images that each caption is compared with.")] = 4,
    show: Annotated[int, typer.Option(min=0, help="Findings of a kind to print.")] = 10,
    out: Annotated[Path | None, typer.Option(help="JSON file to write all findings to.")] = None,
    force: Force = False,
) -> None:
    """List what may be wrong in the training data of a recipe: captions, duplicates, contradictions.

    Captions that fit other images better than their own (by a trained model), images in training and validation,
    also scaled or compressed anew, and captions of one image that contradict each other in number or colour.
    """
    from frozenprefix.utils import check_output

    if out is not None:
        check_output(out, {"captions", "leaks", "contradictions"}, force=force)
    from frozenprefix.assets import check_checkpoint
    from frozenprefix.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    own = loaded.output_dir / "best"
    judge = checkpoint or (str(own) if (own / "config.json").is_file() else None)
    if judge is not None:
        check_checkpoint(judge)
    from frozenprefix.data.check import check_samples
    from frozenprefix.data.sources import load_sources
    from frozenprefix.utils import progress_bar

    train = load_sources(loaded.data.train)
    validation = load_sources(loaded.data.validation)
    with progress_bar("reading images") as update:
        report = check_samples(_in_parts(train, validation), examples=10**6, progress=update)
    found = {
        "leaks": {
            "in_two_parts": [asdict(leak) for leak in report.in_two_splits],
            "same_bytes": [asdict(leak) for leak in report.same_bytes],
            "near_duplicates": [asdict(leak) for leak in report.near_duplicates],
        },
        "contradictions": contradictions_of(train),
        "captions": [] if judge is None else _judged(judge, train, limit, others),
        "judged_by": judge,
    }
    write_json(out, found)
    _print(found, show)
    if judge is None:
        typer.echo(f"captions are not judged: '{own}' is no checkpoint; train the recipe, or give --checkpoint")


def _in_parts(train: list[Sample], validation: list[Sample]) -> list[Sample]:
    """The samples with the parts of the recipe as splits."""
    from dataclasses import replace

    parts = {"train": train, "validation": validation}
    return [
        replace(sample, split=part, id=f"{part}:{sample.id}") for part, samples in parts.items() for sample in samples
    ]


def contradictions_of(samples: list[Sample]) -> list[dict[str, Any]]:
    """Contradictions among the captions of each image."""
    from frozenprefix.data.contradictions import contradictions

    captions: dict[str, list[str]] = {}
    for sample in samples:
        if sample.task == "caption" and len(sample.images) == 1:
            captions.setdefault(str(sample.images[0]), []).extend(sample.targets)
    return [{"image": image, **asdict(each)} for image, texts in captions.items() for each in contradictions(texts)]


def _judged(checkpoint: str, samples: list[Sample], limit: int | None, others: int) -> list[dict[str, Any]]:
    from frozenprefix.data.features import ImageFeatures
    from frozenprefix.data.sources.selection import first_images
    from frozenprefix.evaluation.samples import recipe_storage
    from frozenprefix.inference import Captioner, audit_captions
    from frozenprefix.utils import progress_bar

    captioner = Captioner.from_pretrained(checkpoint)
    asked = [sample for sample in samples if sample.task == "caption" and len(sample.images) == 1]
    asked = first_images(asked, limit)
    storage = recipe_storage(checkpoint, captioner.encoder.fingerprint)
    files = [sample.images[0] for sample in asked]
    with progress_bar("encoding images") as update:
        features = ImageFeatures.from_encoder(captioner.encoder, files, storage, max_bad_share=1.0, progress=update)
    asked = [sample for sample in asked if sample.images[0] not in features.bad]
    with progress_bar("judging captions") as update:
        audited = audit_captions(captioner, asked, features, others=others, progress=update)
    return [_row(caption) for caption in audited if caption.evidence < 0]


def _row(caption: AuditedCaption) -> dict[str, Any]:
    return {**asdict(caption), "image": str(caption.image)}


def _print(found: dict[str, Any], show: int) -> None:
    for name, leaks in found["leaks"].items():
        typer.echo(f"{name.replace('_', ' ')}: {len(leaks)}")
        for leak in leaks[:show]:
            typer.echo(f"  {shown(leak['image'])} and {shown(leak['other'])}")
    typer.echo(f"contradictions: {len(found['contradictions'])}")
    for each in found["contradictions"][:show]:
        first, second = map(one_line, each["captions"])
        typer.echo(f"  {shown(each['image'])}: {each['first']} or {each['second']} {each['noun']}: {first} / {second}")
    if found["judged_by"] is not None:
        typer.echo(f"captions that fit other images better than their own: {len(found['captions'])}")
        for each in found["captions"][:show]:
            typer.echo(f"  {each['evidence']:+.1f}  {shown(each['image'])}: {one_line(each['caption'])}")
