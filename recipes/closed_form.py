"""A mapper without training: the classes of an ImageNet classifier, passed to a frozen language model by their names.

    python recipes/closed_form.py PHOTO [PHOTO ...] [--output runs/closed_form] [--mapper mlp|linear]

The image encoder is the classifier's own, so a row of the classifier's weights is a direction of the image features,
and it has a name, which is words of the language model. "linear" goes from one to the other by least squares; "mlp"
holds the classifier itself as its hidden layer. The result is an ordinary checkpoint, which `frozenprefix caption
runs/closed_form PHOTO` reads too. The language model repeats the name that stands in the image's place:

    A photo of a<image>
    A photo of a

It needs the first "A photo of a": an image at the very start is a position that the model hardly reads.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.table import Table
from timm.data import ImageNetInfo

from frozenprefix import Captioner
from frozenprefix.config import load_recipe
from frozenprefix.data import load_image
from frozenprefix.errors import FrozenPrefixError
from frozenprefix.models.mappers import PrefixMapper
from frozenprefix.models.mappers.closed_form import (
    NamedVectors,
    class_name_embeddings,
    fit_last_layer,
    insert_classifier,
    nearest_names,
)
from frozenprefix.models.vision import find_weights_file, read_weights
from frozenprefix.training import build_model
from frozenprefix.utils import show_log

RECIPE = Path(__file__).with_name("mlp.yaml")
PROMPT = "A photo of a<image>\nA photo of a"
MAPPERS = {
    "linear": {"type": "linear", "prefix_length": 3},
    "mlp": {"type": "mlp", "prefix_length": 3, "hidden_dim": 1000, "activation": "relu"},
}


def main(photos: list[Path], output: Path, mapper: str) -> None:
    settings = {"model.mapper": MAPPERS[mapper], "data.prompts.caption": PROMPT, "training.precision": "fp32"}
    recipe = load_recipe(RECIPE, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    model, processor = build_model(recipe)

    classes = imagenet_classes(str(recipe.model.vision_encoder.weights))
    targets = class_name_embeddings(
        classes.names, processor.tokenizer, model.language_model, recipe.model.mapper.prefix_length
    )
    if mapper == "linear":
        fit_last_layer(cast(PrefixMapper, model.mapper), classes, targets)
    else:
        insert_classifier(cast(PrefixMapper, model.mapper), classes, targets)
    model.save_pretrained(output)
    processor.save_pretrained(output)

    table = Table("photo", "nearest names", "the language model", title_justify="left")
    captioner = Captioner(model, processor)
    said = captioner.caption(photos, num_beams=1, max_new_tokens=8)
    for photo, caption in zip(photos, said, strict=True):
        pixel_values = processor.image_processor(load_image(photo), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            prefix_embeds = model.map_features(model.encode(pixel_values))
        nearest = nearest_names(prefix_embeds, targets, count=3)[0].tolist()
        table.add_row(photo.name, ", ".join(classes.names[index] for index in nearest), caption.text.split("\n")[0])
    console = Console()
    console.print(table)
    console.print(f"checkpoint {output}")


def imagenet_classes(weights: str) -> NamedVectors:
    """The classifier of the EfficientNet-Lite weights, with the first WordNet lemma of every class as its name."""
    state = read_weights(find_weights_file(weights)[0])
    names = [lemmas.split(",")[0] for lemmas in ImageNetInfo("imagenet-1k").label_descriptions()]
    return NamedVectors(state["_fc.weight"], names, state["_fc.bias"])


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fit a mapper in closed form and name what is in photos.")
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/closed_form"), help="checkpoint folder to write")
    parser.add_argument("--mapper", choices=sorted(MAPPERS), default="mlp")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    show_log()
    try:
        main(**vars(parse(sys.argv[1:])))
    except FrozenPrefixError as error:
        sys.exit(f"Error: {error}")
