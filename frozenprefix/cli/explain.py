"""`frozenprefix explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from frozenprefix.cli.common import (
    Arithmetic,
    Checkpoint,
    Force,
    LanguageModel,
    MaxNewTokens,
    Precision,
    check_files,
    print_left_out,
    write_json,
)
from frozenprefix.cli.others import NumOthers, Others, other_images


def command(
    checkpoint: Checkpoint,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files.", show_default=False)],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("explanation.html"),
    text: Annotated[str | None, typer.Option(help="Explain this text; by default what the model writes.")] = None,
    question: Annotated[str | None, typer.Option(help="Explain the answer to this question.")] = None,
    others: Others = None,
    num_others: NumOthers = 16,
    json_out: Annotated[Path | None, typer.Option("--json", help="JSON file to write all numbers to.")] = None,
    max_new_tokens: MaxNewTokens = 30,
    language_model: LanguageModel = None,
    precision: Precision = Arithmetic.auto,
    force: Force = False,
) -> None:
    """Write an HTML page that shows what each word of a caption rests on. Exit code 1 if some image cannot be read.

    Evidence against other images, heat maps, likely alternatives, and the nearest words of the prefix embeddings.
    """
    from frozenprefix.assets import check_checkpoint
    from frozenprefix.utils import check_output, progress_bar

    check_checkpoint(checkpoint)
    check_files(images, "IMAGE")
    check_output(out, (), force=force)
    if json_out is not None:
        check_output(json_out, {"image", "words", "occlusion"}, force=force, option="--json")
    from frozenprefix.data.images import BadImages
    from frozenprefix.errors import BadImageError
    from frozenprefix.inference import Captioner
    from frozenprefix.interpret import Explainer, write_explanations

    captioner = Captioner.from_pretrained(checkpoint, language_model=language_model, precision=precision.value)
    bad = BadImages()
    compares = captioner.retriever is None
    features = other_images(captioner, checkpoint, images, others, num_others) if compares else ()
    explainer = Explainer(captioner, features)
    prompt = None if question is None else captioner.processor.prompt_for("vqa", question)
    explanations = []
    with progress_bar("explaining") as update:
        for number, image in enumerate(images, start=1):
            try:
                explanations.append(explainer(image, text, prompt=prompt, max_new_tokens=max_new_tokens))
            except BadImageError as error:
                bad.record(image, error)
            update(number, len(images))
    if explanations:
        write_explanations(out, explanations, title=f"What words rest on: {checkpoint}")
        write_json(json_out, [explanation.to_dict() for explanation in explanations])
        typer.echo(f"{len(explanations)} explained: {out}")
    print_left_out(bad, "IMAGE", len(images))
    if len(bad):
        raise typer.Exit(1)
