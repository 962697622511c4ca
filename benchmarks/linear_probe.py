"""What the image features say about a photo, and how much of it the captions say.

    python benchmarks/linear_probe.py recipes/mlp.yaml [KEY=VALUE ...] [--predictions FILE] [--json FILE] [--quick]

For each word of a list (things, actions, colours, numbers) a logistic regression on the frozen encoder's features
learns whether at least two of an image's captions use the word, in any of its forms. It is trained on the recipe's
training images and read on its validation images: average precision, and the F1 score at the threshold that is best on
the training images. Beside it stands the F1 score of generated captions (`--predictions`, a file that
`frozenprefix evaluate` wrote), which say a word or do not. The probe's score is about what a better mapper could win
with this encoder; the rest is up to the encoder. Chance is the average precision of features drawn at random: the
word's share.

The features of several tokens are averaged. Each feature is standardised, and weights are decayed.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, precision_recall_curve
from torch import Tensor

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from frozenprefix.config import load_recipe
from frozenprefix.data.features import ImageFeatures
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.training.setup import load_samples
from frozenprefix.utils import read_jsonl

# kind -> words, each with its forms
WORDS: dict[str, list[str]] = {
    "things": ["dog dogs", "man men", "woman women lady", "boy boys", "girl girls", "child children kid kids baby",
               "water pool lake ocean river", "beach sand", "grass field", "snow", "street road sidewalk", "ball",
               "bike bicycle", "rock rocks cliff", "car truck", "tree trees woods forest", "crowd people"],
    "actions": ["run runs running", "jump jumps jumping leaps leaping", "sit sits sitting", "stand stands standing",
                "play plays playing", "walk walks walking", "ride rides riding", "climb climbs climbing",
                "swim swims swimming", "hold holds holding", "smile smiles smiling laughing"],
    "colours": ["black", "white", "brown tan", "red", "blue", "yellow", "green", "pink", "orange"],
    "numbers": ["one", "two", "three", "four", "group several many"],
}  # fmt: skip
AGREE = 2  # captions of an image that have to use a word
DECAYS = (1e-3, 1e-2, 1e-1)


def mentions(texts: Sequence[str], forms: str) -> int:
    """Number of texts that use one of the forms of a word."""
    pattern = re.compile(rf"\b({forms.replace(' ', '|')})\b", re.IGNORECASE)
    return sum(pattern.search(text) is not None for text in texts)


def labels_of(references: Sequence[Sequence[str]], words: Sequence[str], agree: int = AGREE) -> np.ndarray:
    """bool[images, words]: whether at least `agree` of an image's texts use the word."""
    return np.array([[mentions(texts, word) >= agree for word in words] for texts in references])


def fit(features: Tensor, labels: Tensor, decay: float, steps: int = 60) -> tuple[Tensor, Tensor]:
    """Logistic regressions of all words at once: weights float[D, words] and biases float[words]."""
    weight = torch.zeros(features.shape[1], labels.shape[1], requires_grad=True)
    bias = torch.zeros(labels.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(features @ weight + bias, labels, reduction="none").mean(0).sum()
        loss = loss + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def best_threshold(truth: np.ndarray, score: np.ndarray) -> float:
    precision, recall, thresholds = precision_recall_curve(truth, score)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    return float(thresholds[min(int(f1.argmax()), len(thresholds) - 1)])


def f1_score(truth: np.ndarray, said: np.ndarray) -> float:
    both = float((truth & said).sum())
    return 2 * both / max(1.0, float(truth.sum() + said.sum()))


def probe(train: Tensor, held: Tensor, truth: np.ndarray, held_truth: np.ndarray) -> dict[str, np.ndarray]:
    """Average precision and F1 score of every word on held-out images; the decay is chosen on a fifth of the others."""
    mean, deviation = train.mean(0), train.std(0).clamp_min(1e-6)
    train, held = (train - mean) / deviation, (held - mean) / deviation
    labels, kept = torch.from_numpy(truth).float(), len(train) * 4 // 5
    losses = {}
    for decay in DECAYS:
        weight, bias = fit(train[:kept], labels[:kept], decay)
        logits = train[kept:] @ weight + bias
        losses[decay] = float(F.binary_cross_entropy_with_logits(logits, labels[kept:]))
    weight, bias = fit(train, labels, min(losses, key=lambda decay: losses[decay]))
    own, other = (train @ weight + bias).numpy(), (held @ weight + bias).numpy()
    thresholds = [best_threshold(truth[:, word], own[:, word]) for word in range(truth.shape[1])]
    precision = [average_precision_score(held_truth[:, word], other[:, word]) for word in range(truth.shape[1])]
    f1 = [f1_score(held_truth[:, word], other[:, word] >= at) for word, at in enumerate(thresholds)]
    return {"average_precision": np.array(precision), "f1": np.array(f1)}


def read(recipe: Any, quick: bool) -> tuple[dict[str, Tensor], dict[str, list[list[str]]], dict[str, list[str]]]:
    """Features, captions and sample ids of the images of both parts."""
    encoder = ImageEncoder.from_config(recipe.model.vision_encoder)
    features, texts, ids = {}, {}, {}
    for part, sources in (("train", recipe.data.train), ("validation", recipe.data.validation)):
        samples = load_samples(sources, part)[: 40 if quick else None]
        paths = [sample.images[0] for sample in samples]
        found = ImageFeatures.from_encoder(encoder, paths, recipe.data.feature_storage)
        features[part] = torch.cat([found(paths[start : start + 256]).mean(1) for start in range(0, len(paths), 256)])
        texts[part], ids[part] = [list(sample.targets) for sample in samples], [sample.id for sample in samples]
    return features, texts, ids


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    features, texts, ids = read(recipe, arguments.quick)
    words = [(kind, word) for kind, listed in WORDS.items() for word in listed]
    truth = {part: labels_of(listed, [word for _, word in words]) for part, listed in texts.items()}
    # a word that hardly occurs says nothing
    enough = [n for n in range(len(words)) if min(labels[:, n].sum() for labels in truth.values()) >= arguments.least]
    words, truth = [words[n] for n in enough], {part: labels[:, enough] for part, labels in truth.items()}
    scores = probe(features["train"], features["validation"], truth["train"], truth["validation"])
    report: dict[str, Any] = {
        "recipe": arguments.recipe.stem,
        "encoder": recipe.model.vision_encoder.model_dump(mode="json", exclude_defaults=True),
        "images": {part: len(listed) for part, listed in ids.items()},
        "words": [
            {"kind": kind, "word": word.split()[0], "share": float(truth["validation"][:, n].mean()),
             "average_precision": float(scores["average_precision"][n]), "f1": float(scores["f1"][n])}
            for n, (kind, word) in enumerate(words)
        ],
    }  # fmt: skip
    if arguments.predictions is not None:
        captions = {row["id"]: row["model"] for _, row in read_jsonl(arguments.predictions)}
        said = labels_of([[captions.get(name, "")] for name in ids["validation"]], [w for _, w in words], agree=1)
        for n, row in enumerate(report["words"]):
            row["captions_f1"] = f1_score(truth["validation"][:, n], said[:, n])
    report["kinds"] = {kind: _mean(report["words"], kind) for kind in dict.fromkeys(kind for kind, _ in words)}
    if arguments.quick:
        report["note"] = "quick: a few images; it shows only that the script works"
    return report


def _mean(rows: Sequence[Mapping[str, Any]], kind: str) -> dict[str, float]:
    chosen = [row for row in rows if row["kind"] == kind]
    names = [name for name in ("share", "average_precision", "f1", "captions_f1") if name in chosen[0]]
    return {name: statistics.fmean(row[name] for row in chosen) for name in names}


def markdown(report: dict[str, Any]) -> str:
    names = list(next(iter(report["kinds"].values())))
    rows = [[kind, *scores.values()] for kind, scores in report["kinds"].items()]
    labels = {"share": "chance", "average_precision": "average precision", "f1": "F1", "captions_f1": "F1 of captions"}
    return f"`{report['recipe']}`, {report['images']['validation']} images.\n\n" + common.table(
        ["words", *(labels[name] for name in names)], rows
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__)
    parser.set_defaults(readme=Path(__file__).with_name("quality.md"))
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as in `frozenprefix train`")
    parser.add_argument("--predictions", type=Path, help="predictions of `frozenprefix evaluate --task caption`")
    parser.add_argument("--least", type=int, default=10, help="images of each part that a word has to occur in")
    return common.publish(run, parser.parse_intermixed_args(argv), "linear_probe", markdown)


if __name__ == "__main__":
    main()
