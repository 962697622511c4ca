"""Recall and ranks by hand, and the evaluation of a model whose vectors are known."""

from __future__ import annotations

import json
from math import comb
from pathlib import Path

import numpy as np
import pytest

from frozenprefix.data.samples import Sample
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.evaluation import EvaluationOptions
from frozenprefix.evaluation.comparison import Evaluation, compare
from frozenprefix.evaluation.tasks.retrieval import (
    RETRIEVAL,
    chance_metrics,
    evaluate_retrieval,
    ranks_both_ways,
    retrieval_metrics,
)
from frozenprefix.inference.embedding import Embedder
from frozenprefix.utils import file_sha256
from tests.helpers.drawings import COLOURS
from tests.helpers.processes import fake_process, replace_gathering
from tests.helpers.retrieval import EYE, ColourModel, ColourProcessor

# ── metrics ──


def test_ranks_by_hand():
    images = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    texts = np.array([[0.9, 0.1], [1.0, 0.0], [0.5, 0.5]], np.float32)
    ranks = ranks_both_ways(images, texts, np.array([0, 1, 1]))
    # image 0 owns text 0, behind text 1; image 1 owns texts 1 (last) and 2 (first)
    assert ranks["image_to_text"].tolist() == [2, 1]
    assert ranks["text_to_image"].tolist() == [1, 2, 2], "a tie counts against the model"


def test_equal_vectors_are_not_found():
    """A model that gives the same vector for everything is never right, not always."""
    same = np.ones((4, 2), np.float32)
    metrics = retrieval_metrics(same, np.repeat(same, 5, axis=0), np.repeat(np.arange(4), 5))
    assert metrics["text_to_image_recall@1"] == 0.0
    assert metrics["image_to_text_recall@10"] == 0.0
    assert (metrics["text_to_image_median_rank"], metrics["image_to_text_median_rank"]) == (4.0, 16.0)


def test_recall_and_median_rank_by_hand():
    texts = EYE[[0, 1, 3, 2]]  # the last two have each other's vector
    metrics = retrieval_metrics(EYE, texts, np.arange(4), (1, 5))
    assert metrics["text_to_image_recall@1"] == 0.5
    assert metrics["text_to_image_recall@5"] == 1.0
    assert metrics["image_to_text_median_rank"] == 2.5  # ranks 1, 1, 4, 4: ties stand in front


def test_chance_is_what_drawing_at_random_gives():
    metrics = chance_metrics(np.repeat(np.arange(1000), 5), 1000)
    assert metrics["text_to_image_recall@10"] == pytest.approx(0.01)
    assert metrics["text_to_image_median_rank"] == 500
    assert metrics["image_to_text_recall@10"] == pytest.approx(1 - comb(4995, 10) / comb(5000, 10))
    rank = int(metrics["image_to_text_median_rank"])
    assert 1 - comb(4995, rank) / comb(5000, rank) >= 0.5 > 1 - comb(4995, rank - 1) / comb(5000, rank - 1)
    few = chance_metrics(np.array([0, 0, 1]), 2, (1, 3))
    assert few["image_to_text_recall@1"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert few["image_to_text_recall@3"] == 1.0


def test_random_vectors_score_as_chance_says():
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(200), 5)
    metrics = retrieval_metrics(rng.normal(size=(200, 16)), rng.normal(size=(1000, 16)), owner)
    chance = chance_metrics(owner, 200)
    for name in ("text_to_image_recall@10", "image_to_text_recall@10"):
        assert metrics[name] == pytest.approx(chance[name], abs=0.04)


# ── evaluation ──


def of_colours(images: Path, **texts: str) -> list[Sample]:
    """A sample for each colour's image, with the texts given or its own."""
    return [Sample(c, (images / f"{c}.png",), tuple(texts.get(c, f"a {c} square").split("|"))) for c in COLOURS]


def options_for(path: Path, **more) -> EvaluationOptions:
    return EvaluationOptions(predictions=path, **more)


def rows_of(path: Path) -> dict[str, dict]:
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_evaluate_retrieval(colour_embedder, colour_images, tmp_path):
    path = tmp_path / "made" / "p.jsonl"
    samples = [Sample(c, (colour_images / f"{c}.png",), (f"a {c} square", f"{c} paint")) for c in COLOURS]
    result = evaluate_retrieval(colour_embedder, samples, options_for(path))
    assert (result["task"], result["n"], result["settings"]["texts"]) == ("retrieval", 3, 6)
    assert result["metrics"]["text_to_image_recall@1"] == 1.0
    assert result["metrics"]["image_to_text_recall@1"] == 1.0
    assert result["intervals"]["text_to_image_recall@1"] == [1.0, 1.0]
    assert result["baselines"]["shuffled"]["text_to_image_recall@1"] == 0.0
    assert result["baselines"]["chance"]["text_to_image_recall@1"] == pytest.approx(1 / 3)
    assert result["predictions"] == str(path)
    assert result["predictions_sha256"] == file_sha256(path)
    assert json.loads(json.dumps(result)) == result, "plain JSON"


def test_metrics_intervals_and_rows_by_hand(colour_embedder, colour_images, tmp_path):
    """The green image has three texts, two of which name other colours; equal scores of others stand in front."""
    samples = of_colours(colour_images, green="green paint|blue|red")
    result = evaluate_retrieval(colour_embedder, samples, options_for(tmp_path / "p.jsonl"), recall_at=[1, 3])
    metrics = result["metrics"]
    assert metrics == {
        "text_to_image_recall@1": 3 / 5,  # over texts: the mean over images would be 7 / 9
        "text_to_image_recall@3": 1.0,
        "text_to_image_median_rank": 1.0,
        "image_to_text_recall@1": 1 / 3,
        "image_to_text_recall@3": 1.0,
        "image_to_text_median_rank": 2.0,
    }
    texts, owner = [text for sample in samples for text in sample.targets], np.array([0, 1, 1, 1, 2])
    _, vectors = colour_embedder.embed_images([sample.images[0] for sample in samples])
    assert metrics == retrieval_metrics(vectors, colour_embedder.embed_texts(texts), owner, (1, 3))
    rows = rows_of(tmp_path / "p.jsonl")
    assert list(rows) == list(COLOURS) == ["red", "green", "blue"]
    green = rows["green"]
    assert (green["images"], green["references"]) == (
        [str(colour_images / "green.png")],
        ["green paint", "blue", "red"],
    )
    assert green["model"] == {
        "image_ranks": [1, 3, 3],
        "text_rank": 1,
        "images": ["green", "red", "blue"],
        "text": "green paint",
    }
    assert (rows["red"]["model"]["image_ranks"], rows["red"]["model"]["text_rank"]) == ([1], 2)
    assert green["scores"]["model"]["text_to_image_recall@1"] == pytest.approx(1 / 3)
    assert green["statistics"]["text_to_image_recall@1"] == [1, 3]
    assert green["shuffled"]["image_ranks"][0] == 3, "the green image has the vector of another"
    # drawn are three images, with all their texts: at worst green alone, 3 of 9, at best without it
    assert result["intervals"]["text_to_image_recall@1"] == [pytest.approx(1 / 3), 1.0]
    assert result["intervals"].keys() == {name for name in metrics if "recall" in name}, "no median"


def test_two_models_can_be_compared(colour_embedder, colour_images, tmp_path):
    class Confused(ColourModel):
        """Takes red for blue."""

        def encode_image(self, image_features):
            return super().encode_image(image_features)[:, [2, 1, 0]]

    loaded = []
    for name, model in (("a", Confused()), ("b", colour_embedder.model)):
        options = options_for(tmp_path / f"{name}.jsonl")
        result = RETRIEVAL.run(Embedder(model, ColourProcessor()), of_colours(colour_images), options)
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
        loaded.append(Evaluation.load(tmp_path / f"{name}.json"))
    compared = compare(*loaded)
    assert (compared["n"], compared["images"]) == (3, 3)
    row = compared["metrics"]["text_to_image_recall@1"]
    assert (row["a"], row["b"], row["difference"]) == pytest.approx((1 / 3, 1, 2 / 3))
    assert 0 <= row["low"] < 2 / 3 < row["high"] <= 1
    assert compared["metrics"]["text_to_image_median_rank"]["p_value"] is None


def test_the_main_process_does_it_for_all(colour_embedder, colour_images, tmp_path, monkeypatch):
    gathered: list[dict] = []
    replace_gathering(monkeypatch, lambda items: gathered.extend(items) or list(gathered))
    first, second = (
        evaluate_retrieval(
            colour_embedder,
            of_colours(colour_images),
            options_for(tmp_path / "p.jsonl", processes=fake_process(rank, 2)),
        )
        for rank in (0, 1)
    )
    assert second == first
    assert colour_embedder.model.seen == 3


def test_evaluate_retrieval_refuses_what_it_cannot_compare(colour_embedder, colour_images, tmp_path):
    options = options_for(tmp_path / "p.jsonl")
    one = Sample("a", (colour_images / "red.png",), ("red",))
    with pytest.raises(DataError, match="got 1 images with texts"):
        evaluate_retrieval(colour_embedder, [one], options)
    with pytest.raises(DataError, match="several images"):
        evaluate_retrieval(
            colour_embedder, [Sample("b", (*one.images, colour_images / "blue.png"), ("x",)), one], options
        )
    with pytest.raises(DataError, match="1 ids occur more than once"):
        evaluate_retrieval(colour_embedder, [one, Sample("a", (colour_images / "blue.png",), ("blue",))], options)
    for recall_at in (5, [], [0, 1], "1"):
        with pytest.raises(ConfigError, match=r"recall_at: got .*, expected a list of whole numbers from 1"):
            evaluate_retrieval(colour_embedder, of_colours(colour_images), options, recall_at=recall_at)
    with pytest.raises(ConfigError, match=r"task 'retrieval' has no option 'recall' \(did you mean 'recall_at'\?\)"):
        RETRIEVAL.run(
            colour_embedder, of_colours(colour_images), options_for(tmp_path / "p.jsonl", extra={"recall": 5})
        )


def test_images_that_cannot_be_read_are_left_out(colour_embedder, colour_images, tmp_path):
    (colour_images / "green.png").write_bytes(b"no image")
    options = options_for(tmp_path / "p.jsonl", max_bad_share=0.5)
    result = evaluate_retrieval(colour_embedder, of_colours(colour_images), options)
    assert (result["n"], result["bad_images"]) == (2, {"not_an_image": 1})
    assert list(rows_of(tmp_path / "p.jsonl")) == ["red", "blue"]
    with pytest.raises(DataError, match="1 of 3 images are bad"):
        evaluate_retrieval(colour_embedder, of_colours(colour_images), options_for(tmp_path / "p.jsonl"))
