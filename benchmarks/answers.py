"""Answers per second of an evaluation: everything about an image in one row, against one row for each question.

    python benchmarks/answers.py [--quick] [--json FILE]

Images have about ten questions each, drawn from a hundred, as in easy-VQA. Every question is answered in three runs: by
the model, by the blind language model, and with the image of another sample. An answer is a word and the token that
ends it. Both arms compute features of no image, ask the blind model each different question once, and have the same
random model with the shapes of SmolLM2-135M. One reads 32 prompts at a time, sorted by length, with transformers'
`generate`. The other is the path of `frozenprefix evaluate --task vqa`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from itertools import count, product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.workloads import FLOAT, PREFIX, features_of, our_model, shapes
from frozenprefix import Captioner, FrozenPrefixProcessor
from frozenprefix.data import Sample
from frozenprefix.data.features import ImageFeatures
from frozenprefix.data.images import BadImages
from frozenprefix.evaluation import EvaluationOptions
from frozenprefix.evaluation.journal import Journal
from frozenprefix.evaluation.tasks.runs import generating, predict_runs, shuffled
from frozenprefix.inference.captioner import batched
from frozenprefix.kernels.precision import measure_products

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
SETTINGS = {"num_beams": 1, "max_new_tokens": 2}
Texts = dict[str, dict[str, str]]


def questions() -> list[str]:
    """About a hundred different questions, with the words of easy-VQA's."""
    things = [*(f"{colour} shape" for colour in COLOURS), *SHAPES]
    forms = (
        "is a {} present?", "is there a {}?", "is there a {} in the image?", "does the image contain a {}?",
        "is no {} present?", "is there not a {}?", "is there not a {} in the image?",
        "does the image not contain a {}?",
    )  # fmt: skip
    seeing = ["what color is the shape?", "what shape is present?", "what shape is in the image?"]
    return [*seeing, *(form.format(thing) for form, thing in product(forms, things))]


def samples_of(images: int) -> list[Sample]:
    """Questions about images that exist by name alone."""
    draw, number, known = random.Random(0), count(), questions()
    return [
        Sample(str(next(number)), (Path(f"{image}.png"),), ("yes",), question=question, task="vqa")
        for image in range(images)
        for question in [*known[:2], *draw.sample(known[2:], draw.randint(4, 12))]
    ]


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """One token for each word of the questions, and made-up words for all others that the language model has."""
    split = pre_tokenizers.Whitespace()
    texts = ["Question: Answer:", *questions()]
    words = dict.fromkeys(word for text in texts for word, _ in split.pre_tokenize_str(text))
    words |= dict.fromkeys(f"w{place}" for place in range(len(words) + 2, size))
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(["<s>", "</s>", *words])}))
    made.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")


class Workload:
    """A captioner, the questions, and the features of their images."""

    def __init__(self, quick: bool, precision: str, images: int):
        config = shapes(quick)["llama"].config
        model = our_model(config, FLOAT[precision]).eval()
        words = tokenizer(config.vocab_size)
        processor = FrozenPrefixProcessor(CLIPImageProcessor(), words, prefix_length=PREFIX)
        model.config.image_token_id = processor.image_token_id
        self.captioner, self.samples = Captioner(model, processor), samples_of(images)
        paths = list(dict.fromkeys(path for sample in self.samples for path in sample.images))
        self.images = ImageFeatures(dict(zip(paths, features_of(len(paths)), strict=True)), BadImages())

    def per_question(self) -> Texts:
        """A row for each question, 32 at a time, by transformers' `generate`."""
        processor = self.captioner.processor
        prompts = {s.id: processor.prompt_for("vqa", s.question) for s in self.samples}
        first = {prompts[sample.id]: sample.id for sample in reversed(self.samples)}
        by_length = sorted(self.samples, key=lambda sample: len(prompts[sample.id]))
        other = {s.id: o.images for s, o in zip(self.samples, shuffled(self.samples), strict=True)}
        texts: Texts = {"model": {}, "blind": {}, "shuffled": {}}
        for batch in batched(by_length, 32):
            asked = [prompts[sample.id] for sample in batch]
            for run, images in (("model", [s.images for s in batch]), ("shuffled", [other[s.id] for s in batch])):
                texts[run] |= zip((s.id for s in batch), self._generate(asked, images), strict=True)
        for batch in batched([s for s in by_length if s.id in first.values()], 32):
            asked = [self.captioner.blind_prompt(prompts[sample.id]) for sample in batch]
            texts["blind"] |= zip((s.id for s in batch), self._generate(asked, None), strict=True)
        blind = {s.id: texts["blind"][first[prompts[s.id]]] for s in self.samples}
        return {**texts, "blind": blind}

    def _generate(self, prompts: Sequence[str], images: Sequence[Sequence[Path]] | None) -> list[str]:
        inputs = self.captioner.processor(text=list(prompts), return_tensors="pt")
        features = None if images is None else self.images([path for paths in images for path in paths])
        output = self.captioner.model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], image_features=features,
            return_dict_in_generate=True, output_scores=True, do_sample=False, eos_token_id=1, pad_token_id=1,
            **SETTINGS,
        )  # fmt: skip
        self.captioner.model.language_model.compute_transition_scores(
            output.sequences, output.scores, normalize_logits=True
        )
        return self.captioner.processor.batch_decode(output.sequences)

    def shared(self) -> Texts:
        """Everything about an image in one row."""
        with tempfile.TemporaryDirectory() as folder:
            options = EvaluationOptions(Path(folder) / "predictions.jsonl", num_beams=1)
            journal = Journal(options.predictions, {})
            answer = generating(self.captioner, self.images, SETTINGS)
            return predict_runs(self.captioner, self.samples, answer, journal, options)


@torch.no_grad()
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    config = shapes(arguments.quick)["llama"].config
    rates = measure_products(config.hidden_size, config.intermediate_size)
    precision = arguments.precision or ("bf16" if rates.faster == torch.bfloat16 else "fp32")
    images, rounds = (4, 1) if arguments.quick else (arguments.images, arguments.rounds)
    work = Workload(arguments.quick, precision, images)
    seconds = common.timed_rounds({"per_question": work.per_question, "shared": work.shared}, rounds)
    answers = 3 * len(work.samples)
    exact = work if precision == "fp32" else Workload(arguments.quick, "fp32", min(images, 4))
    report: dict[str, Any] = {
        "precision": precision,
        "answers": answers,
        "answers_per_s": {name: answers / statistics.median(times) for name, times in seconds.items()},
        "ratio": common.median_ratio(seconds["per_question"], seconds["shared"]),
        "same_answers_fp32": same_answers(exact.per_question(), exact.shared()),
    }
    if arguments.quick:
        report["note"] = "quick: tiny models and one round; it shows only that the script works"
    return report


def same_answers(one: Texts, other: Texts) -> float:
    """Share of the answers of all runs that are the same."""
    pairs = [(text, other[run][key]) for run, texts in one.items() for key, text in texts.items()]
    return sum(a == b for a, b in pairs) / len(pairs)


def markdown(report: dict[str, Any]) -> str:
    rates = report["answers_per_s"]
    rows = [
        ["answers/s, a row for each question, transformers' `generate`", rates["per_question"], ""],
        ["answers/s, everything about an image in one row", rates["shared"], ""],
        ["ratio (median over the rounds)", report["ratio"], "≥ 5"],
        ["share of the same answers, fp32", report["same_answers_fp32"], "1"],
    ]
    return f"{report['answers']} answers in {report['precision']}.\n\n" + common.table(["", "", "target"], rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="by default the faster one here")
    return common.publish(run, parser.parse_args(argv), "answers", markdown)


if __name__ == "__main__":
    main()
