"""Does evidence tell true captions from false ones? Risk and coverage on photos with five reference captions.

    python benchmarks/evidence.py --checkpoint runs/mlp/best --json evidence.json

Captions of validation photos are ranked by the LM's own score, by their lowest and by their mean evidence, and the best
of each ranking are kept. Then words under a floor are left out, as `frozenprefix caption --evidence FLOOR` does. A
caption counts as true if the references have every word of it that says something (a rough measure: they need not name
all).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from frozenprefix.evaluation.metrics import caption_metrics
from frozenprefix.evaluation.samples import folder_samples, join_captions
from frozenprefix.inference import Captioner, EvidenceScorer
from frozenprefix.inference.evidence import WordEvidence
from frozenprefix.inference.supported import BOUNDARIES, FUNCTION_WORDS, lowest_evidence, supported

COVERAGES = (1.0, 0.8, 0.6, 0.4, 0.2)
FLOOR_COLUMNS = ("floor", "coverage", "changed", "words", "true", "true, by score", "CIDEr-D")
FLOORS = (-0.5, 0.0, 0.25, 0.5)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = common.parser(__doc__)
    options.add_argument("--checkpoint", default="runs/mlp/best")
    options.add_argument("--data", default="data/flickr8k")
    options.add_argument("--images", type=int, default=300)
    options.add_argument("--others", type=int, default=16)
    options.add_argument("--show", type=int, default=30, help="captions to read, in the report")
    return common.publish(run, options.parse_args(argv), "evidence", markdown)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    images = 6 if arguments.quick else arguments.images
    others = 2 if arguments.quick else arguments.others
    samples = join_captions(folder_samples(arguments.data, "caption", split="val"))
    chosen = random.Random(0).sample(samples, min(images + others, len(samples)))
    compared, asked = chosen[:others], chosen[others:]
    captioner = Captioner.from_pretrained(arguments.checkpoint)
    scorer = EvidenceScorer(captioner, [sample.images[0] for sample in compared])
    prompt = captioner.processor.prompt_for("caption")
    texts: list[str] = []
    scores: list[float] = []
    words: list[list[WordEvidence]] = []
    for files, features in captioner.encoder.batches([sample.images[0] for sample in asked], 16):
        prompts = [prompt] * len(files)
        found = captioner.generate(prompts, features, num_beams=5, max_new_tokens=30)
        texts += [each.text.strip() for each in found]
        scores += [each.score or 0.0 for each in found]
        words += scorer(prompts, [each.text.strip() for each in found], features)
    references = {sample.id: list(sample.targets) for sample in asked}
    ids = list(references)
    true = np.array([is_true(text, references[key]) for text, key in zip(texts, ids, strict=True)])
    cider = cider_of(dict(zip(ids, texts, strict=True)), references)
    rankings = {
        "the LM's score": np.array(scores),
        "lowest evidence": np.array([lowest_evidence(told) or 0.0 for told in words]),
        "mean evidence": np.array([mean_evidence(told) for told in words]),
        "evidence of the caption": np.array([sum(word.evidence or 0.0 for word in told) for told in words]),
    }
    return {
        "checkpoint": arguments.checkpoint,
        "images": len(asked),
        "others": others,
        "curves": {name: curve(values, true, cider) for name, values in rankings.items()},
        "floors": [floored(floor, texts, words, references, scores, true, cider) for floor in FLOORS],
        "captions": [
            {
                "image": asked[place].images[0].name,
                "caption": text,
                "evidence": [[word.text, round(word.evidence or 0.0, 2)] for word in words[place]],
                "supported": {str(floor): supported(text, words[place], floor)[0] for floor in FLOORS},
                "true": bool(true[place]),
                "references": references[ids[place]][:2],
            }
            for place, text in enumerate(texts[: arguments.show])
        ],
    }


def curve(values: np.ndarray, true: np.ndarray, cider: np.ndarray) -> list[dict[str, float]]:
    """Share of true captions and mean CIDEr-D of the best share of a ranking."""
    order = np.argsort(-values, kind="stable")
    rows = []
    for coverage in COVERAGES:
        kept = order[: max(1, round(coverage * len(order)))]
        rows.append({"coverage": coverage, "true": float(true[kept].mean()), "cider_d": float(cider[kept].mean())})
    return rows


def floored(
    floor: float,
    texts: Sequence[str],
    words: Sequence[Sequence[WordEvidence]],
    references: Mapping[str, list[str]],
    scores: Sequence[float],
    true: np.ndarray,
    cider: np.ndarray,
) -> dict[str, float]:
    """What is left with a floor, beside as many whole captions with the best scores of the LM."""
    kept = [supported(text, told, floor)[0] for text, told in zip(texts, words, strict=True)]
    ids = list(references)
    left = [place for place, text in enumerate(kept) if text]
    best = np.argsort(-np.array(scores), kind="stable")[: len(left)]
    now = cider_of({key: text or "." for key, text in zip(ids, kept, strict=True)}, references)
    return {
        "floor": floor,
        "coverage": len(left) / len(texts),
        "changed": sum(kept[place] != texts[place] for place in left) / max(1, len(left)),
        "words": float(np.mean([len(kept[place].split()) for place in left])) if left else 0.0,
        "words_before": float(np.mean([len(text.split()) for text in texts])),
        "true": float(np.mean([is_true(kept[place], references[ids[place]]) for place in left])) if left else 0.0,
        "true_by_score": float(true[best].mean()) if left else 0.0,
        "true_whole": float(true[left].mean()) if left else 0.0,
        "cider_d": float(now[left].mean()) if left else 0.0,
        "cider_d_by_score": float(cider[best].mean()) if left else 0.0,
        "cider_d_whole": float(cider[left].mean()) if left else 0.0,
    }


def cider_of(texts: Mapping[str, str], references: Mapping[str, list[str]]) -> np.ndarray:
    per_image = caption_metrics(dict(texts), dict(references)).per_image
    return np.array([per_image[key]["cider_d"] for key in texts])


def is_true(text: str, references: Sequence[str]) -> bool:
    """Whether the references have every word of a text that says something, in any ending.

    Example:
        >>> is_true("A dog runs.", ["dogs running on grass"]), is_true("A red dog", ["a dog"])
        (True, False)
    """
    known = {stem(word) for reference in references for word in split(reference)}
    return all(stem(word) in known for word in split(text) if word not in FUNCTION_WORDS | BOUNDARIES)


def split(text: str) -> list[str]:
    return [word for word in "".join(c if c.isalnum() else " " for c in text.lower()).split() if word]


def stem(word: str) -> str:
    for ending in ("ing", "ies", "es", "ed", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word.rstrip("e")


def mean_evidence(words: Sequence[WordEvidence]) -> float:
    asked = [word.evidence or 0.0 for word in words if word.text.lower() not in FUNCTION_WORDS | BOUNDARIES]
    return float(np.mean(asked)) if asked else 0.0


def markdown(report: dict[str, Any]) -> str:
    rows = [
        [name, *(f"{point['true']:.2f} / {point['cider_d']:.2f}" for point in points)]
        for name, points in report["curves"].items()
    ]
    ranked = common.table(["true / CIDEr-D at a coverage of", *map(str, COVERAGES)], rows)
    floors = [
        [row["floor"], row["coverage"], row["changed"], row["words"], row["true"], row["true_by_score"], row["cider_d"]]
        for row in report["floors"]
    ]
    return ranked + "\n" + common.table(FLOOR_COLUMNS, floors)


if __name__ == "__main__":
    main()
