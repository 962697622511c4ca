"""Questions answered by choosing the likeliest of candidate answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from frozenprefix.data.features import FeatureStorage
from frozenprefix.data.images import load_image
from frozenprefix.data.samples import Sample
from frozenprefix.data.sources import load_source
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.evaluation import EvaluationOptions, evaluate_checkpoint
from frozenprefix.evaluation.tasks import runs, vqa
from frozenprefix.evaluation.tasks.candidates import candidate_answers
from frozenprefix.evaluation.tasks.vqa import VQA, evaluate_vqa
from tests.helpers.answers import ids_of
from tests.helpers.data import rows_of

CANDIDATES = ["red", "a red circle", "red dog", "blue", "green", "circle", "cross", "the dog"]


@pytest.fixture(scope="module")
def train(shapes):
    return load_source({"type": "qa", "path": str(shapes), "split": "train"})


def choosing(path: Path, candidates=CANDIDATES, **more) -> EvaluationOptions:
    extra = {"answering": "choose", "candidates": candidates}
    return EvaluationOptions(predictions=path, features=FeatureStorage("off"), extra=extra, **more)


# ── the candidates ──


def answered(*answers: str) -> list[Sample]:
    return [Sample(str(i), (), (text,), question="?", task="vqa") for i, text in enumerate(answers)]


def test_the_most_common_answers():
    samples = [*answered("no", "yes", " yes", "2", "yes", "no", " "), Sample("x", (), ("3", "2"), task="vqa")]
    assert candidate_answers(100, samples) == ["yes", "no", "2", "3"]
    assert candidate_answers(2, samples) == ["yes", "no"]
    assert candidate_answers(3, answered("b", "a", "c")) == ["b", "a", "c"], "equally common: the first seen"


def test_a_list_is_taken_as_it_is():
    assert candidate_answers(["two", "a cat"], answered("no", "yes")) == ["two", "a cat"]


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (1, ConfigError, "candidates: got 1, expected a number of answers from 2, or a list"),
        (True, ConfigError, "candidates: got True, expected a number"),
        ("yes", ConfigError, "candidates: got 'yes', expected a number"),
        ([True, False], ConfigError, r"got True in the list.*candidates=\['yes', 'no', '2'\]"),
        (["yes", " "], ConfigError, "got ' ' in the list, expected texts"),
        (["yes", "no", "yes "], ConfigError, "got 'yes' more than once, expected at least 2 different"),
        (["yes"], ConfigError, r"got \['yes'\], expected at least 2 different"),
        (100, DataError, r"the 2 training samples have 1 different answers.*candidates=\['red', 'blue'\]"),
    ],
)
def test_wrong_candidates(asked, error, message):
    with pytest.raises(error, match=message):
        candidate_answers(asked, answered("yes", "yes"))


# ── the choice ──


@torch.no_grad()
def likeliest_alone(captioner, sample, image, candidates) -> str:
    """The candidate with the largest sum of log-probabilities with its end, each in a plain forward pass of its own."""
    model, processor = captioner.model, captioner.processor
    prompt = f"{'' if image is None else '<image>'}Question: {sample.question} Answer:"
    inputs = {} if image is None else processor.image_processor([load_image(image)], return_tensors="pt")
    context, scores = processor.encode_prompt(prompt), []
    for text in candidates:
        ids = processor.encode_target(prompt, text)
        assert ids[-1] == processor.tokenizer.eos_token_id, "the end counts"
        logits = model(input_ids=torch.tensor([[*context, *ids]]), **inputs).logits[0, len(context) - 1 : -1]
        scores.append(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item())
    return candidates[scores.index(max(scores))]


def test_the_chosen_answer_is_the_likeliest_alone(captioner, questions, tmp_path):
    # one token each, so that the choice depends on the question and the image and not on the length alone
    letters = list("abcdefghijklmnopqrstuvwxyz")
    result = evaluate_vqa(captioner, questions, choosing(tmp_path / "p.jsonl", letters))
    rows = rows_of(tmp_path / "p.jsonl")
    others = runs.shuffled(questions)
    for row, sample, other in zip(rows, questions, others, strict=True):
        assert row["model"] == likeliest_alone(captioner, sample, sample.images[0], letters)
        assert row["blind"] == likeliest_alone(captioner, sample, None, letters)
        assert row["shuffled"] == likeliest_alone(captioner, sample, other.images[0], letters)
    assert len({row["model"] for row in rows}) > 1, "one answer to everything: this test proves nothing"
    assert result["settings"] == {"answering": "choose", "candidates": 26}


def test_candidates_of_several_tokens(captioner, questions, tmp_path):
    result = evaluate_vqa(captioner, questions, choosing(tmp_path / "p.jsonl"))
    rows = rows_of(tmp_path / "p.jsonl")
    for row, sample in zip(rows, questions, strict=True):
        assert row["model"] == likeliest_alone(captioner, sample, sample.images[0], CANDIDATES)
    hits = [row["model"] == row["references"][0] for row in rows]
    assert result["metrics"]["accuracy"] == sum(hits) / 8
    assert result["baselines"].keys() == {"blind", "shuffled"}
    assert result["groups"]["model"]["accuracy"].keys() == {"color", "shape"}


def test_the_candidates_come_from_the_training_samples(captioner, questions, train, tmp_path):
    options = choosing(tmp_path / "p.jsonl", 2, train_samples=train)
    result = evaluate_vqa(captioner, questions, options)
    assert result["settings"] == {"answering": "choose", "candidates": 2}
    chosen = {row[run] for row in rows_of(tmp_path / "p.jsonl") for run in ("model", "blind", "shuffled")}
    assert chosen <= set(candidate_answers(2, train))


def test_a_checkpoint_on_a_folder(tiny_checkpoint, shapes, train, tmp_path):
    options = {"task": "vqa", "data": shapes, "predictions": tmp_path / "p.jsonl", "answering": "choose"}
    result = evaluate_checkpoint(tiny_checkpoint, split="val", **options)
    answers = {text for sample in train for text in sample.targets}
    assert result["settings"] == {"answering": "choose", "candidates": len(answers)}
    assert {row["model"] for row in rows_of(tmp_path / "p.jsonl")} <= answers
    with pytest.raises(DataError, match="candidates: the 0 training samples have 0 different answers"):
        evaluate_checkpoint(tiny_checkpoint, split="train", **options)


def test_training_samples_are_read_only_where_answers_are_taken_from_them():
    assert VQA.uses_train({"answering": "choose"})
    assert VQA.uses_train({"answering": "choose", "candidates": 20})
    assert not VQA.uses_train({"answering": "choose", "candidates": ["red", "blue"]})
    assert not VQA.uses_train({})


# ── killed, and refused ──


def test_a_killed_evaluation_goes_on(captioner, questions, tmp_path, monkeypatch):
    whole = evaluate_vqa(captioner, questions, choosing(tmp_path / "whole.jsonl"))
    choose, asked = vqa.choose, []

    def guarded(captioner, batch, *rest):
        if len(asked) == 16:
            asked.append(("killed", ""))
            raise KeyboardInterrupt
        asked.extend(ids_of(batch))
        return choose(captioner, batch, *rest)

    monkeypatch.setattr(vqa, "choose", guarded)
    path = tmp_path / "p.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate_vqa(captioner, questions, choosing(path))
    with pytest.raises(ConfigError, match=r"candidates: an evaluation was begun with 8 .* this one has 6"):
        evaluate_vqa(captioner, questions, choosing(path, CANDIDATES[:6]))
    with pytest.raises(ConfigError, match="list of candidates: an evaluation was begun with"):
        evaluate_vqa(captioner, questions, choosing(path, CANDIDATES[::-1]))
    with pytest.raises(ConfigError, match=r"answering: an evaluation was begun with 'choose' .* has 'generate'"):
        evaluate_vqa(captioner, questions, EvaluationOptions(predictions=path, features=FeatureStorage("off")))
    result = evaluate_vqa(captioner, questions, choosing(path))
    assert len(asked) == len(set(asked)) == 24 + 1, "8 questions in each of three runs"
    assert {**result, "predictions": ""} == {**whole, "predictions": ""}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"extra": {"answering": "guess"}}, "answering: got 'guess', expected 'generate' or 'choose'"),
        ({"extra": {"candidates": 5}}, "candidates: nothing is chosen with answering='generate'"),
        ({"extra": {"answering": "choose"}, "num_beams": 3}, "num_beams: nothing is generated with answering='choose'"),
        ({"extra": {"answering": "choose"}, "max_new_tokens": 3}, "max_new_tokens: nothing is generated"),
    ],
)
def test_options_that_do_not_fit(captioner, questions, tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_vqa(captioner, questions, EvaluationOptions(predictions=tmp_path / "p.jsonl", **given))
