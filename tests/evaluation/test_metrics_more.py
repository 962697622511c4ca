"""Diversity, retrieval, classification, CLIPScore, WUPS and question types, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from frozenprefix.errors import AssetError, DataError
from frozenprefix.evaluation.metrics.captions import bleu_of_sums, caption_metrics
from frozenprefix.evaluation.metrics.classification import classification_report
from frozenprefix.evaluation.metrics.clip_score import clip_score, embed_captions, embed_images, ref_clip_score
from frozenprefix.evaluation.metrics.diversity import diversity
from frozenprefix.evaluation.metrics.question_types import answer_type, question_type
from frozenprefix.evaluation.metrics.recall import first_ranks, rank_metrics
from frozenprefix.evaluation.metrics.wups import WordNet, wups

# ── captions ──


def test_bleu_from_sums_is_bleu_of_the_corpus():
    references = {"1": ["a dog runs on the grass", "the dog"], "2": ["a cat sits"], "3": ["two men talk in a street"]}
    predictions = {"1": "a dog runs on grass", "2": "", "3": "two men walk in a long street"}
    scores = caption_metrics(predictions, references)
    rows = np.array([scores.bleu_statistics[key] for key in references], dtype=float)
    both = bleu_of_sums(np.stack([rows.sum(axis=0), rows[0]]))
    for name, values in both.items():
        assert values[0] == pytest.approx(scores.corpus[name], rel=1e-12)
        assert values[1] == pytest.approx(scores.per_image["1"][name], rel=1e-12)


def test_diversity_by_hand():
    # words: a dog runs | a dog runs | the cat; bigrams: a dog, dog runs (twice each), the cat
    assert diversity(["A dog runs.", "a dog runs", "the cat"], max_n=2) == {
        "distinct_1": 5 / 8,
        "distinct_2": 3 / 5,
        "distinct_captions": 2.0,
        "most_common_share": pytest.approx(2 / 3),
        "vocabulary": 5.0,
        "mean_length": pytest.approx(8 / 3),
    }
    assert diversity(["", ""])["distinct_1"] == 0.0


def test_diversity_of_nothing_is_refused():
    with pytest.raises(DataError, match="captions are empty"):
        diversity([])
    with pytest.raises(DataError, match="max_n must be ≥ 1, got 0"):
        diversity(["a"], max_n=0)


# ── retrieval ──


def test_ranks_by_hand():
    similarity = [[0.9, 0.1, 0.5], [0.2, 0.3, 0.4], [0.1, 0.6, 0.6]]
    assert first_ranks(similarity, [[0], [0, 1], [2]]).tolist() == [1, 2, 2], "a tie counts against the model"


def test_a_constant_model_finds_nothing():
    ranks = first_ranks(np.zeros((4, 10)), [[i] for i in range(4)])
    assert ranks.tolist() == [10] * 4
    assert rank_metrics(ranks, ks=(1, 9))["recall@9"] == 0.0


def test_recall_and_median_rank():
    assert rank_metrics([1, 2, 7, 30], ks=(1, 5)) == {
        "recall@1": 0.25,
        "recall@5": 0.5,
        "median_rank": 4.5,
        "mean_rank": 10.0,
    }


@pytest.mark.parametrize(
    ("similarity", "relevant", "message"),
    [
        ([[1.0, 2.0]], [[0], [1]], r"one row per entry of relevant, 2; got shape \[1, 2\]"),
        ([[1.0, 2.0]], [[2]], r"relevant\[0\] must name columns from 0 to 1, got \[2\]"),
        ([[1.0, 2.0]], [[]], r"relevant\[0\] must name columns"),
        ([[1.0, float("nan")]], [[0]], "1 NaN values"),
    ],
)
def test_bad_rankings_are_refused(similarity, relevant, message):
    with pytest.raises(DataError, match=message):
        first_ranks(similarity, relevant)


# ── classification ──

TRUE = ["cat", "cat", "cat", "dog", "dog", "bird"]
SAID = ["cat", "cat", "dog", "dog", "cat", "cat"]


def test_classification_by_hand():
    report = classification_report(SAID, TRUE)
    assert report["accuracy"] == 3 / 6
    assert report["labels"] == ["bird", "cat", "dog"]
    assert report["confusion"] == [[0, 1, 0], [0, 2, 1], [0, 1, 1]]
    assert report["per_class"]["cat"] == {
        "precision": 0.5,
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(4 / 7),
        "support": 3,
    }
    assert report["per_class"]["bird"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert report["macro_f1"] == pytest.approx((0 + 4 / 7 + 1 / 2) / 3)
    assert report["weighted_f1"] == pytest.approx((3 * 4 / 7 + 2 * 1 / 2) / 6)


def test_classification_with_given_labels():
    report = classification_report([1, 0], [1, 1], labels=[1, 0, 2])
    assert report["labels"] == ["1", "0", "2"]
    assert report["confusion"] == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]
    with pytest.raises(DataError, match="labels does not name 'cow'"):
        classification_report(["cow"], ["cat"], labels=["cat"])
    with pytest.raises(DataError, match="labels names a class twice"):
        classification_report(["cat"], ["cat"], labels=["cat", "cat"])
    with pytest.raises(DataError, match="equally long and not empty, got 1 and 0"):
        classification_report(["cat"], [])


@pytest.mark.parity
def test_classification_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")
    rng = np.random.default_rng(0)
    true, said = (rng.integers(5, size=200).tolist() for _ in range(2))
    ours, theirs = classification_report(said, true), metrics.classification_report(true, said, output_dict=True)
    assert ours["macro_f1"] == pytest.approx(theirs["macro avg"]["f1-score"])
    assert ours["weighted_precision"] == pytest.approx(theirs["weighted avg"]["precision"])
    assert ours["per_class"]["3"]["recall"] == pytest.approx(theirs["3"]["recall"])


# ── CLIPScore ──


def test_clip_score_by_hand():
    images = [[2.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    texts = torch.tensor([[3.0, 3.0], [-1.0, 0.0], [0.0, 5.0]])
    assert clip_score(images, texts) == pytest.approx([2.5 * math.sqrt(0.5), 0.0, 0.0], abs=1e-7)


def test_ref_clip_score_is_the_harmonic_mean_with_the_nearest_reference():
    images, texts = [[1.0, 0.0], [1.0, 0.0]], [[1.0, 1.0], [-1.0, 0.0]]
    references = [[[0.0, 1.0], [1.0, 1.0]], [[-1.0, 0.0]]]
    near = 2.5 * math.sqrt(0.5)
    assert ref_clip_score(images, texts, references) == pytest.approx([2 * near * 1 / (near + 1), 0.0])


def test_captions_are_embedded_behind_the_prompt_and_in_batches():
    class Encoder:
        texts: list[str] = []  # noqa: RUF012
        sizes: list[int] = []  # noqa: RUF012

        def encode_text(self, texts):
            self.texts += texts
            return torch.ones(len(texts), 3, dtype=torch.bfloat16)

        def encode_image(self, images):
            self.sizes.append(len(images))
            return np.ones((len(images), 3))

    encoder = Encoder()
    assert embed_captions(encoder, ["a dog", "a cat"]).shape == (2, 3)
    assert encoder.texts == ["A photo depicts a dog", "A photo depicts a cat"]
    assert embed_images(encoder, list(range(70))).shape == (70, 3)
    assert encoder.sizes == [64, 6]


@pytest.mark.parametrize(
    ("images", "texts", "references", "message"),
    [
        ([1.0], [[1.0]], [[[1.0]]], r"image_embeds must be \[N, D\], got shape \[1\]"),
        ([[1.0]], [[1.0, 2.0]], [[[1.0]]], r"must agree, got \[1, 1\] and \[1, 2\]"),
        ([[1.0]], [[1.0]], [], "one entry per caption, 1; got 0"),
        ([[1.0]], [[1.0]], [[[1.0, 2.0]]], r"reference_embeds\[0\] must be \[R, 1\]"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(images, texts, references, message):
    with pytest.raises(DataError, match=message):
        ref_clip_score(images, texts, references)


# ── WUPS ──

PARENTS = {"entity": None, "animal": "entity", "dog": "animal", "cat": "animal", "puppy": "dog", "table": "entity"}


class Tree:
    """Wu-Palmer over `PARENTS`: twice the depth of the lowest common ancestor over the sum of the depths."""

    def path(self, word):
        return [] if word is None or word not in PARENTS else [*self.path(PARENTS[word]), word]

    def similarity(self, first, second):
        a, b = self.path(first), self.path(second)
        common = sum(x == y for x, y in zip(a, b, strict=False))
        return 2 * common / (len(a) + len(b)) if a and b else 0.0


@pytest.mark.parametrize(
    ("said", "true", "at_0", "at_09"),
    [
        ("dog", "dog", 1.0, 1.0),
        ("Dog ", "dog", 1.0, 1.0),
        ("puppy", "dog", 6 / 7, 0.6 / 7),
        ("cat", "dog", 4 / 6, 0.4 / 6),
        ("cat, dog", "dog, cat", 1.0, 1.0),
        ("dog", "dog, cat", 4 / 6, 0.4 / 6),
        ("dog, table", "dog", 2 / 5, 0.2 / 5),
        ("unicorn", "unicorn", 1.0, 1.0),
        ("tape_dispenser", "tape dispenser", 1.0, 1.0),
        ("unicorn", "dog", 0.0, 0.0),
        ("", "dog", 0.0, 0.0),
    ],
)
def test_wups_by_hand(said, true, at_0, at_09):
    given = {"q": said}, {"q": [true]}
    assert wups(*given, threshold=0.0, taxonomy=Tree())["q"] == pytest.approx(at_0)
    assert wups(*given, threshold=0.9, taxonomy=Tree())["q"] == pytest.approx(at_09)


def test_wups_takes_the_nearest_of_several_answers():
    assert wups({"q": "dog"}, {"q": ["table", "dog"]}, taxonomy=Tree()) == {"q": 1.0}
    with pytest.raises(DataError, match=r"answers\['q'\] must be a list"):
        wups({"q": "dog"}, {"q": "dog"}, taxonomy=Tree())
    with pytest.raises(DataError, match=r"threshold must lie in \[0, 1\], got 2"):
        wups({"q": "dog"}, {"q": ["dog"]}, threshold=2, taxonomy=Tree())


def test_wordnet_takes_the_nearest_senses_and_nouns_only():
    class Sense:
        def __init__(self, value):
            self.value = value

        def wup_similarity(self, other):
            return None if other.value == 0 else self.value * other.value

    class Reader:
        asked: list[tuple[str, str]] = []  # noqa: RUF012

        def synsets(self, word, pos):
            self.asked.append((word, pos))
            return {"a_b": [Sense(0.5), Sense(0.9)], "c": [Sense(0.0), Sense(1.0)]}.get(word, [])

    words = WordNet(Reader())
    assert words.similarity("a b", "c") == 0.9
    assert words.similarity("a b", "unknown") == 0.0
    assert ("a_b", "n") in Reader.asked


def test_missing_wordnet_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nltk.corpus", None)
    with pytest.raises(AssetError, match="nltk is not installed; pip install nltk") as caught:
        wups({"q": "dog"}, {"q": ["cat"]})
    assert "\n" not in str(caught.value)


# ── kinds of questions ──


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What color is the dog?", "what color is the"),
        ("What colorful thing?", "what"),
        ("What's on the table?", "what is on the"),
        ("How many people are in the boat?", "how many people are in"),
        ("Is this a dog?", "is this a"),
        ("Is this art?", "is this"),
        ("Name it.", "none of the above"),
        ("", "none of the above"),
    ],
)
def test_question_types(question, expected):
    assert question_type(question) == expected


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["Yes", "yes.", "no"], "yes/no"),
        (["two", "2", "dog"], "number"),
        (["2.5"], "number"),
        (["no dog"], "other"),
        ([], "other"),
    ],
)
def test_answer_types(answers, expected):
    assert answer_type(answers) == expected
