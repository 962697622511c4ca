"""The metrics as `evaluate.Metric`s: same values as the functions, no network, state between batches."""

from __future__ import annotations

import socket

import evaluate
import numpy as np
import pytest

from frozenprefix.errors import ConfigError
from frozenprefix.evaluation.metrics import caption_metrics
from frozenprefix.evaluation.metrics.hf import METRICS, load_metric

SAID = ["a dog runs on the grass", "a cat"]
RIGHT = [["a dog is running", "the dog runs on grass"], ["a cat sits", "the cat"]]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("reached for the network"))


@pytest.mark.parametrize("name", METRICS.names())
def test_every_metric_loads(name):
    metric = load_metric(name)
    assert isinstance(metric, evaluate.Metric)
    assert metric.description
    assert "Give" in metric.inputs_description


def test_unknown_metric_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown metric 'cidr_d' \(did you mean 'cider_d'\?\)"):
        load_metric("cidr_d")


def test_caption_metrics_are_those_of_the_functions():
    expected = caption_metrics(
        dict(enumerate(SAID)),
        {i: texts for i, texts in enumerate(RIGHT)},  # noqa: C416
    )
    bleu = load_metric("bleu").compute(predictions=SAID, references=RIGHT)
    assert bleu == {name: expected.corpus[name] for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4")}
    assert load_metric("rouge_l").compute(predictions=SAID, references=RIGHT) == {
        "rouge_l": expected.corpus["rouge_l"],
        "rouge_l_each": [each["rouge_l"] for each in expected.per_image.values()],
    }
    cider = load_metric("cider_d").compute(predictions=SAID, references=RIGHT)
    assert cider["cider_d"] == expected.corpus["cider_d"] > 0


def test_batches_add_up_and_a_metric_can_be_used_again():
    metric = load_metric("cider_d")
    whole = metric.compute(predictions=SAID, references=RIGHT)
    metric.add(prediction=SAID[0], reference=RIGHT[0])
    metric.add_batch(predictions=SAID[1:], references=RIGHT[1:])
    assert metric.compute() == whole


def test_cider_of_one_image_needs_frequencies_of_others():
    given = {"predictions": ["a dog"], "references": [["a dog"]]}
    assert load_metric("cider_d").compute(**given)["cider_d"] == 0.0
    df = ({("a",): 4.0, ("dog",): 1.0, ("a", "dog"): 1.0}, 4.0)
    assert load_metric("cider_d").compute(**given, df=df)["cider_d"] == pytest.approx(5.0)


def test_combined():
    both = evaluate.combine([load_metric("vqa_accuracy"), load_metric("exact_match")])
    result = both.compute(predictions=["Red.", "two"], references=[["red"], ["two"]])
    assert (result["vqa_accuracy"], result["exact_match"]) == (1.0, 0.5)


def test_vqa_compatibility_is_a_switch():
    given = {"predictions": ["dog"], "references": [["the dog"] * 10]}
    assert load_metric("vqa_accuracy").compute(**given)["vqa_accuracy"] == 1.0
    assert load_metric("vqa_accuracy").compute(**given, compat=True)["vqa_accuracy"] == 0.0


def test_wups_at_both_thresholds():
    class Half:
        def similarity(self, first, second):
            return 0.5

    scores = load_metric("wups").compute(predictions=["dog", "cat"], references=[["dog"], ["dog"]], taxonomy=Half())
    assert scores == {"wups_0.9": pytest.approx(0.525), "wups_0.0": pytest.approx(0.75)}


def test_classification_of_texts_and_of_numbers():
    texts = load_metric("classification").compute(predictions=["a", "b"], references=["a", "a"])
    numbers = load_metric("classification").compute(predictions=[0, 1], references=[0, 0], labels=[0, 1])
    assert texts["accuracy"] == numbers["accuracy"] == 0.5
    assert list(numbers["per_class"]) == ["0", "1"]


def test_diversity_needs_no_references():
    assert load_metric("diversity").compute(predictions=["a dog", "a dog"])["distinct_captions"] == 1.0


def test_retrieval():
    similarity = np.array([[0.9, 0.1], [0.8, 0.3]], dtype=np.float32)
    result = load_metric("retrieval").compute(predictions=similarity, references=[[0], [1]], ks=(1, 2))
    assert result == {"recall@1": 0.5, "recall@2": 1.0, "median_rank": 1.5, "mean_rank": 1.5}


def test_clip_score_from_embeddings_and_through_an_encoder():
    class Encoder:
        def encode_image(self, images):
            return np.array([[1.0, 0.0] for _ in images])

        def encode_text(self, texts):
            return np.array([[1.0, 0.0] if "dog" in text else [0.0, 1.0] for text in texts])

    result = load_metric("clip_score").compute(
        predictions=["a dog", "a cat"],
        references=["1.jpg", "2.jpg"],
        encoder=Encoder(),
        reference_texts=[["the dog"], ["the dog", "my cat"]],
    )
    assert result["clip_score_each"] == pytest.approx([2.5, 0.0])
    assert result["ref_clip_score_each"] == pytest.approx([2 * 2.5 / 3.5, 0.0])
    embedded = load_metric("clip_score").compute(predictions=[[1.0, 0.0], [0.0, 1.0]], references=[[1.0, 0.0]] * 2)
    assert embedded == {"clip_score": pytest.approx(1.25), "clip_score_each": pytest.approx([2.5, 0.0])}
    with pytest.raises(ConfigError, match="got captions without an encoder"):
        load_metric("clip_score").compute(predictions=["a dog"], references=["1.jpg"])
