"""Does `frozenprefix data audit` find wrong captions? Some are swapped on purpose, and looked for.

    python benchmarks/audit.py --checkpoint runs/mlp/best --json audit.json

Of the captions of validation photos, which the model was not trained on, 5 % are given to other photos. Then all are
ranked by their evidence (the lowest first). Precision and recall are those of the captions under 0, and of as many of
the lowest as were swapped; beside them the LM's log-probability alone, which knows the photo but not what is usual.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from frozenprefix.data import Sample
from frozenprefix.data.features import FeatureStorage, ImageFeatures
from frozenprefix.evaluation.samples import folder_samples, join_captions
from frozenprefix.inference import Captioner, audit_captions
from frozenprefix.inference.evidence import target_of
from frozenprefix.inference.likelihood import log_likelihoods


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = common.parser(__doc__)
    options.add_argument("--checkpoint", default="runs/mlp/best")
    options.add_argument("--data", default="data/flickr8k")
    options.add_argument("--images", type=int, default=400)
    options.add_argument("--others", type=int, default=4)
    options.add_argument("--share", type=float, default=0.05, help="of captions that are swapped")
    return common.publish(run, options.parse_args(argv), "audit", markdown)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    images, others = (4, 2) if arguments.quick else (arguments.images, arguments.others)
    samples = join_captions(folder_samples(arguments.data, "caption", split="val"))
    samples = random.Random(0).sample(samples, min(images, len(samples)))
    samples, wrong = swap_captions(samples, 0.25 if arguments.quick else arguments.share)
    captioner = Captioner.from_pretrained(arguments.checkpoint)
    storage = FeatureStorage("off")
    features = ImageFeatures.from_encoder(captioner.encoder, [sample.images[0] for sample in samples], storage)
    audited = audit_captions(captioner, samples, features, others=others)
    found = np.array([(caption.image, caption.caption) in wrong for caption in audited])
    flagged = sum(caption.evidence < 0 for caption in audited)
    words = np.array([len(caption.caption.split()) for caption in audited])
    per_word = np.argsort([caption.evidence for caption in audited] / words, kind="stable")
    by_score = ranked_by_score(captioner, samples, features)
    plain = np.array([each in wrong for each in by_score])
    return {
        "checkpoint": arguments.checkpoint,
        "images": len(samples),
        "captions": len(audited),
        "swapped": len(wrong),
        "others": others,
        "under_0": {"flagged": flagged, **precision_and_recall(found, flagged)},
        "rankings": {
            "evidence": {"average_precision": average_precision(found), **precision_and_recall(found, len(wrong))},
            "evidence per word": {
                "average_precision": average_precision(found[per_word]),
                **precision_and_recall(found[per_word], len(wrong)),
            },
            "log p of the caption": {
                "average_precision": average_precision(plain),
                **precision_and_recall(plain, len(wrong)),
            },
        },
        "lowest": [
            {
                "image": caption.image.name,
                "caption": caption.caption,
                "evidence": round(caption.evidence, 2),
                "swapped": bool(is_wrong),
            }
            for caption, is_wrong in zip(audited[:40], found, strict=False)
        ],
    }


def swap_captions(samples: Sequence[Sample], share: float) -> tuple[list[Sample], set[tuple[Path, str]]]:
    """Give a share of all captions to the next image in a random order; image and text of those that are wrong now."""
    draw = random.Random(1)
    places = [(row, number) for row, sample in enumerate(samples) for number in range(len(sample.targets))]
    chosen = draw.sample(places, max(2, round(share * len(places))))
    texts = [list(sample.targets) for sample in samples]
    wrong: set[tuple[Path, str]] = set()
    for (row, number), (other, other_number) in zip(chosen, [*chosen[1:], chosen[0]], strict=True):
        text = samples[other].targets[other_number]
        texts[row][number] = text
        if text not in samples[row].targets:
            wrong.add((samples[row].images[0], text))
    return [replace(sample, targets=tuple(each)) for sample, each in zip(samples, texts, strict=True)], wrong


def ranked_by_score(captioner: Captioner, samples: Sequence[Sample], features: ImageFeatures) -> list[tuple[Path, str]]:
    """Captions by log p(caption | image) per token, the lowest first."""
    prompt = captioner.processor.prompt_for("caption")
    scored: list[tuple[float, tuple[Path, str]]] = []
    for start in range(0, len(samples), 16):
        part = samples[start : start + 16]
        groups = [[target_of(captioner, prompt, text) for text in sample.targets] for sample in part]
        embeds = captioner.model.map_features(features([sample.images[0] for sample in part])).detach()
        values = log_likelihoods(captioner.model, groups, embeds)
        for sample, group, each in zip(part, groups, values, strict=True):
            for text, target, value in zip(sample.targets, group, each.tolist(), strict=True):
                scored.append((value / (len(target.input_ids) - target.num_context), (sample.images[0], text)))
    return [key for _, key in sorted(scored, key=lambda item: item[0])]


def precision_and_recall(found: np.ndarray, count: int) -> dict[str, float]:
    """Of the first `count` of a ranking.

    Example:
        >>> precision_and_recall(np.array([True, False, True]), 2)
        {'precision': 0.5, 'recall': 0.5}
    """
    hits = int(found[:count].sum())
    return {"precision": hits / max(1, count), "recall": hits / max(1, int(found.sum()))}


def average_precision(found: np.ndarray) -> float:
    """Mean precision at each wrong caption of a ranking.

    Example:
        >>> round(average_precision(np.array([True, False, True])), 3)
        0.833
    """
    places = np.flatnonzero(found) + 1
    return float(np.mean(np.arange(1, len(places) + 1) / places)) if len(places) else 0.0


def markdown(report: dict[str, Any]) -> str:
    rows = [
        [name, row["average_precision"], row["precision"], row["recall"]] for name, row in report["rankings"].items()
    ]
    under = report["under_0"]
    rows.append([f"evidence under 0 ({under['flagged']} captions)", "–", under["precision"], under["recall"]])
    head = f"{report['swapped']} of {report['captions']} captions of {report['images']} photos swapped"
    return common.table([head, "average precision", "precision", "recall"], rows)


if __name__ == "__main__":
    main()
