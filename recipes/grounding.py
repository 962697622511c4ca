"""A start for grounding.yaml: a mapper that writes the boxes of a drawing as words, fitted without training the LM.

    python recipes/drawings.py grounding data/boxes
    python recipes/grounding.py [--output runs/grounding_start] [KEY=VALUE ...]
    frozenprefix train recipes/grounding.yaml training.init_from=runs/grounding_start

For every drawing the prefix is made to be the word embeddings of the answers to all questions about it,

    the red triangle 34 00 75 38
    the green circle 62 55 94 97
    the blue rectangle 20 39 61 70

by ridge regression from the principal components of its features. The digits come out blurred, but in the right places:
the nearest words of the prefix read almost like this. Training then only has to teach the mapper to write so that the
frozen language model copies the numbers behind the phrase that it is asked for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frozenprefix.config import Recipe, load_recipe
from frozenprefix.data import Sample, load_source
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.errors import ConfigError, FrozenPrefixError
from frozenprefix.inference import Captioner
from frozenprefix.models.mappers.closed_form import fit_linear
from frozenprefix.training import build_model
from frozenprefix.utils import progress_bar, show_log

RECIPE = Path(__file__).with_name("grounding.yaml")
RIDGE = 0.1  # of 0.03, 0.1, 0.3 and 1 the one whose boxes overlap best on validation drawings


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/grounding_start"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the recipe")
    options = parser.parse_args(argv)
    write_start(load_recipe(RECIPE, ["training.init_from=null", *options.overrides]), options.output)


@torch.no_grad()
def write_start(recipe: Recipe, output: Path) -> Captioner:
    """Fit the mapper of the recipe to its training drawings, and save the model as a checkpoint."""
    model, processor = build_model(recipe)
    texts = texts_of(load_source(recipe.data.train[0]))
    encoder = ImageEncoder.from_model(model, processor)
    parts: list[Tensor] = []
    with progress_bar("encoding drawings") as update:
        for _, features in encoder.batches(texts, 16):
            parts.append(features.cpu())
            update(sum(map(len, parts)), len(texts))
    ids = processor.tokenizer(list(texts.values()), add_special_tokens=False)["input_ids"]
    lengths = sorted({len(each) for each in ids})
    if lengths != [recipe.model.mapper.prefix_length]:
        raise ConfigError(
            f"model.mapper.prefix_length: got {recipe.model.mapper.prefix_length}, expected {lengths[-1]}, the tokens "
            f"of the three lines (found {', '.join(map(str, lengths))})"
        )
    fit(model.mapper, torch.cat(parts), model.lm.embed(torch.tensor(ids)).float())
    model.save_pretrained(output)
    processor.save_pretrained(output)
    return Captioner(model, processor)


def texts_of(samples: Sequence[Sample]) -> dict[Path, str]:
    """For each drawing the phrases and boxes in it, a line each, with two digits for every number."""
    lines: dict[Path, list[str]] = {}
    for sample in sorted(samples, key=lambda sample: sample.metadata["phrase"].split()[1]):
        numbers = (min(99, round(100 * value)) for value in sample.metadata["box"])
        line = " ".join([sample.metadata["phrase"], *(f"{number:02d}" for number in numbers)])
        lines.setdefault(sample.images[0], []).append(line + "\n")
    return {image: "".join(each) for image, each in lines.items()}


@torch.no_grad()
def fit(mapper: nn.Module, features: Tensor, targets: Tensor, ridge: float = RIDGE) -> None:
    """Fit an MLP of two layers by ridge regression.

    The hidden layer has the principal components of the features, each with both signs: gelu(x) - gelu(-x) = x, so that
    the last layer can read them as they are.

    Args:
        features: float[drawings, N, D_enc]; targets: float[drawings, P, D_lm].
    """
    first, last = mapper.body.layers[0], mapper.body.layers[-1]
    inputs = mapper.body.input_norm(features).flatten(1)
    mean = inputs.mean(dim=0)
    half = min(first.out_features // 2, len(inputs))
    # [half, N * D_enc], of unit variance
    directions = torch.pca_lowrank(inputs - mean, q=half, niter=2)[2].T
    directions /= ((inputs - mean) @ directions.T).std(dim=0).clamp(min=1e-6)[:, None]
    first.weight.zero_()
    first.bias.zero_()
    first.weight[: 2 * half] = torch.cat([directions, -directions])
    first.bias[: 2 * half] = -first.weight[: 2 * half] @ mean
    # the layer norm behind the mapper has their mean and size, as in models/mappers/closed_form.py
    centre = targets.mean(dim=(0, 1))
    spread = (targets - centre).square().mean().sqrt()
    mapper.scale.norm.bias.copy_(centre)
    mapper.scale.norm.weight.fill_(spread)
    weight, bias = fit_linear(F.gelu(first(inputs)), ((targets - centre) / spread).flatten(1), ridge)
    last.weight.copy_(weight)
    last.bias.copy_(bias)


if __name__ == "__main__":
    show_log()
    try:
        main()
    except FrozenPrefixError as error:
        sys.exit(f"Error: {error}")
