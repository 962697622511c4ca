"""Caption and answer metrics against values worked out by hand."""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from frozenprefix.errors import DataError
from frozenprefix.evaluation.consensus import consensus_captions
from frozenprefix.evaluation.metrics import (
    CaptionReferences,
    by_group,
    caption_metrics,
    exact_match,
    normalize_vqa_answer,
    ptb_tokenize,
    vqa_accuracy,
)
from frozenprefix.evaluation.metrics.captions import _longest_common_subsequence

# What the Java tokenizer gives for these texts; tests/test_metrics_parity.py asks it again.
TOKENS = {
    "A man, a dog and 2 cats.": "a man a dog and 2 cats",
    "The dog's bowl isn't red; they'd say": "the dog 's bowl is n't red they 'd say",
    "I cannot wait, gonna run": "i can not wait gon na run",
    "it’s 5 o'clock, rock 'n' roll": "it 's 5 o'clock rock 'n' roll",
    "Mr. Smith in the U.S. at 10:30 a.m.": "mr. smith in the u.s. at 10:30 a.m.",
    "he said no. Jersey no. 8": "he said no jersey no. 8",
    "a black-and-white t-shirt -- and/or $5 jeans": "a black-and-white t-shirt and/or $ 5 jeans",
    "(left) [right] {both}": "-lrb- left -rrb- -lsb- right -rsb- -lcb- both -rcb-",
    'sign "STOP!" ... wait… what?!': "sign stop wait what ?!",
    "player #23, 1/2 cup, ½ cup, 50%": "player # 23 1/2 cup 1/2 cup 50 %",
    "at&t and AT&T and M&M's": "at & t and at&t and m&m 's",
    "www.site.com/a?b=1 or me@home.org": "www.site.com/a?b=1 or me@home.org",
    "a dog — a cat – an emoji 😀": "a dog a cat an emoji",
    "café señor Zürich": "café señor zürich",
    "line one\nline two": "line one line two",
    "": "",
    " . , ! ": "",
}


@pytest.mark.parametrize("text", TOKENS)
def test_tokens_of_captions(text):
    assert ptb_tokenize(text) == TOKENS[text].split()


def test_a_fraction_keeps_its_number_with_a_no_break_space():
    assert ptb_tokenize("3 1/2 cups") == ["3\u00a01/2", "cups"]


def test_bleu_counts_clipped_ngrams_and_punishes_brevity():
    scores = caption_metrics(
        {"1": "the the the the", "2": "a b"}, {"1": ["the cat sat here"], "2": ["a b c d"]}
    ).per_image
    assert scores["1"]["bleu_1"] == pytest.approx(1 / 4)
    assert scores["2"]["bleu_1"] == pytest.approx(math.exp(1 - 4 / 2))
    assert scores["2"]["bleu_2"] == pytest.approx(math.exp(1 - 4 / 2))


def test_bleu_of_the_corpus_sums_before_it_divides():
    scores = caption_metrics({"1": "a b", "2": "x x x x x x"}, {"1": ["a b"], "2": ["c d e f g h"]})
    assert scores.corpus["bleu_1"] == pytest.approx(2 / 8)


def test_rouge_l_by_hand():
    # longest common subsequence 2, precision 1, recall 2/3
    score = caption_metrics({"1": "a c", "2": "q"}, {"1": ["a b c"], "2": ["z"]}).per_image["1"]["rouge_l"]
    assert score == pytest.approx(2.44 * (2 / 3) / (2 / 3 + 1.44))


def test_longest_common_subsequence_equals_the_table():
    def table(first, second):
        rows = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, a in enumerate(first):
            for j, b in enumerate(second):
                rows[i + 1][j + 1] = rows[i][j] + 1 if a == b else max(rows[i][j + 1], rows[i + 1][j])
        return rows[-1][-1]

    rng = random.Random(0)
    for _ in range(200):
        first, second = (rng.choices("abc", k=rng.randint(0, 12)) for _ in range(2))
        assert _longest_common_subsequence(first, second) == table(first, second)


def test_cider_d_by_hand():
    # "a" is everywhere (weight 0); "dog" and "a dog" agree; there are no longer n-grams: (1 + 1 + 0 + 0) / 4 * 10
    scores = caption_metrics({"1": "a dog", "2": "a dog"}, {"1": ["a dog"], "2": ["a cat"]})
    assert scores.per_image["1"]["cider_d"] == pytest.approx(5.0)
    assert scores.per_image["2"]["cider_d"] == 0.0
    assert scores.corpus["cider_d"] == pytest.approx(2.5)


def test_cider_with_given_document_frequencies():
    df = ({("a",): 4.0, ("dog",): 2.0, ("a", "dog"): 1.0}, 4.0)
    # unigrams: weights a 0, dog log 2, runs log 4; candidate "a dog", reference "a dog runs"; bigrams: a dog, dog runs
    unigram = math.log(2) / math.hypot(math.log(2), math.log(4))
    bigram = 1 / math.sqrt(2)
    damping = math.exp(-1 / 72)
    scores = caption_metrics({"1": "a dog"}, CaptionReferences({"1": ["a dog runs"]}, df=df))
    assert scores.corpus["cider_d"] == pytest.approx(10 * damping * (unigram + bigram) / 4)


def test_cider_of_a_single_image_is_zero_and_says_why(caplog):
    with caplog.at_level(logging.WARNING):
        scores = caption_metrics({"1": "a dog"}, {"1": ["a dog"]})
    assert scores.corpus["cider_d"] == 0.0
    assert [record.message for record in caplog.records] == [
        "CIDEr-D is 0 with the document frequencies of a single image; give df or more images"
    ]


def test_diversity_of_the_predictions():
    corpus = caption_metrics(
        {"1": "A dog.", "2": "a dog", "3": "a cat sits", "4": ""}, {key: ["a dog"] for key in "1234"}
    ).corpus
    assert (corpus["distinct_captions"], corpus["most_common_share"], corpus["mean_length"]) == (3, 0.5, 7 / 4)


def test_references_are_tokenised_once_for_several_prediction_sets(monkeypatch):
    references = CaptionReferences({"1": ["a dog", "the dog"], "2": ["a cat"]})
    seen = []
    monkeypatch.setattr(
        "frozenprefix.evaluation.metrics.references.ptb_tokenize", lambda text: seen.append(text) or text.split()
    )
    first = caption_metrics({"1": "a dog", "2": "a cat"}, references)
    second = caption_metrics({"1": "a cat", "2": "a dog"}, references)
    assert seen == ["a dog", "a cat", "a cat", "a dog"]
    assert first.corpus["cider_d"] > second.corpus["cider_d"] == 0.0


def test_ids_that_differ_are_named():
    with pytest.raises(DataError, match=r"1 of 2 have no prediction \('b'\), 1 predictions have none .*\('c'\)"):
        caption_metrics({"a": "x", "c": "x"}, {"a": ["x"], "b": ["x"]})
    many = {str(i): ["x"] for i in range(9)}
    with pytest.raises(DataError, match=r"9 of 9 have no prediction \('0', '1', '2', ...\)"):
        caption_metrics({}, many)


@pytest.mark.parametrize(
    ("references", "message"),
    [({}, "references are empty"), ({"1": []}, "first '1': got \\[\\]"), ({"1": "a dog"}, "got 'a dog'; give a list")],
)
def test_bad_references_are_refused(references, message):
    with pytest.raises(DataError, match=message):
        CaptionReferences(references)


def test_bad_predictions_and_frequencies_are_refused():
    with pytest.raises(DataError, match=r"predictions\['1'\] must be one caption as a string, got list"):
        caption_metrics({"1": ["a dog"]}, {"1": ["a dog"]})
    with pytest.raises(DataError, match="got 2 images and a frequency of 3"):
        CaptionReferences({"1": ["a dog"]}, df=({("a",): 3}, 2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Two Dogs.", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("its", "its"),
        ("well", "well"),
        ("black-white", "black white"),
        ("black- white", "black white"),
        ("1,000", "1000"),
        ("1,000 (red/blue)", "1000 redblue"),
        ("2.5 m.", "2.5 m"),
        ("tape_dispenser", "tape dispenser"),
        ("  yes\n", "yes"),
        ("the", ""),
    ],
)
def test_vqa_normalisation(text, expected):
    assert normalize_vqa_answer(text) == expected


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_one_annotator_out(matches, expected):
    answers = {"q": ["red"] * matches + [f"other {i}" for i in range(10 - matches)]}
    assert vqa_accuracy({"q": "Red."}, answers)["q"] == pytest.approx(expected)


def test_vqa_accuracy_with_few_annotators():
    assert vqa_accuracy({"q": "a dog"}, {"q": ["dog"]}) == {"q": 1.0}
    assert vqa_accuracy({"q": "cat"}, {"q": ["dog"]}) == {"q": 0.0}
    assert vqa_accuracy({"q": "dog"}, {"q": ["dog", "dog"]}) == {"q": 1.0}
    assert vqa_accuracy({"q": "dog"}, {"q": ["dog", "cat"]}) == {"q": 0.5}


def test_the_skipped_normalisation_is_fixed_and_can_be_had_back():
    agreed, mixed = ["the dog"] * 10, ["the dog"] * 9 + ["cat"]
    assert vqa_accuracy({"q": "dog"}, {"q": agreed}) == {"q": 1.0}
    assert vqa_accuracy({"q": "dog"}, {"q": agreed}, compat=True) == {"q": 0.0}
    assert vqa_accuracy({"q": "the dog"}, {"q": agreed}, compat=True) == {"q": 1.0}
    assert vqa_accuracy({"q": "dog"}, {"q": mixed}, compat=True) == {"q": 1.0}


def test_exact_match():
    answers = {"1": ["tape_dispenser"], "2": ["book, scissor"], "3": ["red", "dark red"]}
    predictions = {"1": "Tape  dispenser", "2": "scissor, book", "3": "dark red"}
    assert exact_match(predictions, answers) == {"1": 0.0, "2": 0.0, "3": 1.0}
    assert exact_match(predictions, answers, underscores_as_spaces=True) == {"1": 1.0, "2": 0.0, "3": 1.0}


@pytest.mark.parametrize("metric", [vqa_accuracy, exact_match])
def test_bad_answers_are_refused(metric):
    with pytest.raises(DataError, match=r"answers\['q'\] must be a list of at least one answer, got 'dog'"):
        metric({"q": "dog"}, {"q": "dog"})
    with pytest.raises(DataError, match="must have the same ids"):
        metric({"q": "dog"}, {"p": ["dog"]})


def test_scores_by_group():
    scores = {"1": 1.0, "2": 0.0, "3": 0.5}
    assert by_group(scores, {"1": "what", "2": "what", "3": "how", "4": "why"}) == {"how": 0.5, "what": 0.5}
    with pytest.raises(DataError, match="2 have none, first '2'"):
        by_group(scores, {"1": "what"})


def _naive_consensus(captions, candidates):
    """Mean tf-idf cosine of each candidate with the others, the slow way."""
    images = [[ptb_tokenize(text) for text in texts] for texts in captions]

    def grams(words):
        return Counter(tuple(words[i : i + n]) for n in (1, 2, 3, 4) for i in range(len(words) - n + 1))

    frequency = Counter(gram for texts in images for gram in set().union(*(grams(words) for words in texts)))

    def cosine(first, second, n):
        first, second = (
            {g: c * math.log(len(captions) / frequency[g]) for g, c in grams(words).items() if len(g) == n}
            for words in (first, second)
        )
        norm = math.sqrt(sum(w * w for w in first.values()) * sum(w * w for w in second.values()))
        return sum(w * second.get(g, 0) for g, w in first.items()) / norm if norm else 0.0

    flat = [(text, ptb_tokenize(text)) for i in candidates for text in captions[i]]
    scores = [
        sum(cosine(a, b, n) for j, (_, b) in enumerate(flat) if j != i for n in (1, 2, 3, 4))
        for i, (_, a) in enumerate(flat)
    ]
    return flat[int(np.argmax(np.round(scores, 9)))][0]


def test_consensus_equals_the_slow_way():
    rng = random.Random(1)
    words = ["a", "dog", "cat", "runs", "on", "the", "grass"]
    captions = [[" ".join(rng.choices(words, k=rng.randint(1, 7))) for _ in range(3)] for _ in range(20)]
    features = np.random.default_rng(0).normal(size=(20, 5))
    queries = np.random.default_rng(1).normal(size=(8, 5))
    unit = [
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries - features.mean(0), features - features.mean(0))
    ]
    expected = [_naive_consensus(captions, np.argsort(-line)[:4]) for line in unit[0] @ unit[1].T]
    assert consensus_captions(queries, features, captions, k=4) == expected


def test_consensus_prefers_agreement_and_leaves_the_own_image_out():
    features = np.array([[1, 0], [0.9, 0.1], [0.8, 0.2], [-1, 0], [-1, 0.1]])
    captions = [["a red car"], ["two dogs run on grass"], ["dogs run on grass"], ["snow"], ["a snow hill"]]
    assert consensus_captions(features[:1], features, captions, k=1) == ["a red car"]
    assert consensus_captions(features[:1], features, captions, k=1, exclude=[0]) == ["two dogs run on grass"]
    assert consensus_captions(features[:1], features, captions, k=3)[0].endswith("dogs run on grass")
    assert len(consensus_captions(features, features, captions, k=99, exclude=[None] * 5)) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_features": np.ones((2, 3))}, r"got \[2, 3\] and \[2, 2\]"),
        ({"train_captions": [["a"]]}, "one list per training image, 2; got 1"),
        ({"train_captions": [["a"], []]}, r"train_captions\[1\] must be a list of at least one caption"),
        ({"k": 0}, "k must be ≥ 1, got 0"),
        ({"exclude": [0]}, "one row or None per query, 2; got 1"),
        ({"exclude": [0, 2]}, "rows of train_features, 0 to 1"),
    ],
)
def test_consensus_refuses_what_does_not_fit(change, message):
    given = {"query_features": np.ones((2, 2)), "train_features": np.eye(2), "train_captions": [["a"], ["b"]]}
    with pytest.raises(DataError, match=message):
        consensus_captions(**{**given, **change})


@pytest.mark.parametrize(
    ("answers", "prediction", "score"),
    [
        (["A"], "", 0.0),
        (["A"], "the", 0.0),
        (["A"], "!", 0.0),
        (["A"], "a", 1.0),
        (["+"] * 10, "+", 1.0),
        (["+"] * 10, "-", 0.0),
        (["?"] * 10, "", 0.0),
        (["the"] * 10, "an", 0.0),
        (["the dog"] * 10, "a dog", 1.0),
        (["the dog"] * 10, "", 0.0),
        (["An"] * 4 + ["a"] * 6, "A", 1.0),
    ],
)
def test_answers_of_which_nothing_is_left_are_compared_as_they_stand(answers, prediction, score):
    assert vqa_accuracy({"1": prediction}, {"1": answers})["1"] == pytest.approx(score)


def test_so_do_wups_and_few_shot_answers():
    from frozenprefix.evaluation.metrics.wups import wups
    from frozenprefix.evaluation.tasks.few_shot import is_right
    from frozenprefix.inference import Episode

    class Nothing:
        def similarity(self, first, second):
            return 0.0

    assert wups({"1": ""}, {"1": [","]}, taxonomy=Nothing()) == {"1": 0.0}
    assert wups({"1": ","}, {"1": [","]}, taxonomy=Nothing()) == {"1": 1.0}
    episode = Episode("1", (), Path("q.png"), "What is this? This is", "a", ("a", "the"))
    assert is_right(episode, "a", "generate") == 1.0
    assert is_right(episode, "", "generate") == is_right(episode, "dog", "generate") == 0.0


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("", ["!"], 0.0),
        ("...", ["!"], 0.0),
        ("", ["?", "\U0001f408"], 0.0),
        ("\U0001f408", ["\U0001f436"], 0.0),
        ("!", ["!"], 1.0),
        ("!", ["a dog", "!"], 1.0),
        ("", ["a dog"], 0.0),
        ("\u72ac", ["\u732b"], 0.0),
        ("\u72ac", ["\u72ac"], 1.0),
    ],
)
def test_captions_of_which_tokenisation_leaves_nothing_are_not_all_equal(prediction, references, expected):
    scores = caption_metrics({"1": prediction, "2": "a cat"}, {"1": references, "2": ["a cat"]})
    assert scores.per_image["1"]["rouge_l"] == expected
