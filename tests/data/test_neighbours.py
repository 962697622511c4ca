"""Which images a new image is like, and how captions are compared, against plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from frozenprefix.data import neighbours
from frozenprefix.data.neighbours import CaptionVectors, NearestImages, RidgeWeights


def test_nearest_images_are_those_with_the_largest_centred_cosine():
    rng = np.random.default_rng(0)
    known, queries = rng.normal(size=(2, 40, 6)) + 5
    centred = [x - known.mean(0) for x in (queries, known)]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in centred]
    expected = np.argsort(-(unit[0] @ unit[1].T), axis=1)
    nearest = NearestImages(known)
    assert np.array_equal(nearest(queries, 5), expected[:, :5])
    without = nearest(queries, 39, exclude=[row[0] for row in expected])
    assert np.array_equal(without, expected[:, 1:])


def test_agreement_is_the_cosine_with_the_other_captions():
    # "b" in one of two images, "a" in both: the idf of "a" is 0, so only "b" and "c" count
    vectors = CaptionVectors.from_counts([[{("a",): 1, ("b",): 1}, {("b",): 2, ("a",): 1}], [{("a",): 1, ("c",): 1}]])
    assert vectors.agreement(np.array([0, 1, 2])).tolist() == [1, 1, 0]
    assert vectors.agreement(np.array([0, 2])).tolist() == [0, 0]


def ridge_prediction(known, targets, queries, ridge):
    """Ridge regression from features to the targets' deviations from their mean, by its textbook formula."""
    middle = targets.mean(axis=0)
    solved = np.linalg.solve(known.T @ known + ridge * np.eye(known.shape[1]), known.T @ (targets - middle))
    return middle + queries @ solved


def standard(features, known):
    scaled = (features - known.mean(axis=0)) / known.std(axis=0)
    return scaled / np.linalg.norm(scaled, axis=1, keepdims=True)


@pytest.mark.parametrize("dim", [5, 60], ids=["fewer dimensions than images", "more"])
def test_ridge_weights_predict_as_ridge_regression_does(dim):
    rng = np.random.default_rng(0)
    known, queries, targets = rng.normal(size=(40, dim)), rng.normal(size=(7, dim)), rng.normal(size=(40, 3))
    weights = RidgeWeights(known, 0.3)(queries).double().numpy()
    assert weights.sum(axis=1) == pytest.approx(np.ones(7), abs=1e-5)
    expected = ridge_prediction(standard(known, known), targets, standard(queries, known), 0.3)
    assert weights @ targets == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dim", [5, 60])
def test_an_excluded_image_is_as_if_it_had_not_been_there(dim):
    rng = np.random.default_rng(1)
    known, targets = rng.normal(size=(40, dim)), rng.normal(size=(40, 3))
    weights = RidgeWeights(known, 0.3)(known[[4, 9, 9]], exclude=[4, 9, None]).double().numpy()
    assert weights[0, 4] == weights[1, 9] == 0
    assert weights[2, 9] > 0.1
    features = standard(known, known)
    for line, row in enumerate((4, 9)):
        others = np.arange(40) != row
        expected = ridge_prediction(features[others], targets[others], features[[row]], 0.3)
        assert weights[[line]] @ targets == pytest.approx(expected, abs=1e-4)


def test_a_feature_that_never_changes_does_no_harm():
    known = np.array([[1.0, 7.0], [2.0, 7.0], [3.0, 7.0]])
    assert RidgeWeights(known)(known).isfinite().all()


COUNTS = [
    [{("a",): 1, ("dog",): 1, ("a", "dog"): 1}, {("a",): 2, ("wolf",): 1}],
    [{("a",): 1, ("cat",): 1, ("a", "cat"): 1}],
    [{("two",): 1, ("cat",): 1, ("two", "cat"): 1}],
]


@pytest.mark.parametrize("mkl", [True, False])
def test_products_with_weighted_sums(monkeypatch, mkl):
    if mkl and not torch.backends.mkl.is_available():
        pytest.skip("this build of torch has no MKL")
    monkeypatch.setattr(neighbours.torch.backends.mkl, "is_available", lambda: mkl)
    vectors = CaptionVectors.from_counts(COUNTS)
    dense = np.zeros((4, len(vectors.idf)))
    for i, (start, stop) in enumerate(zip(vectors.starts, vectors.starts[1:], strict=False)):
        dense[i, vectors.columns[start:stop]] = vectors.weights[start:stop]
    weights = np.array([[0.5, 0.25, 0.25, 0.0], [-0.5, 0.5, 0.5, 0.5]])
    sums = vectors.weighted_sum(torch.tensor(weights, dtype=torch.float32))
    assert sums.T.numpy() == pytest.approx(weights @ dense, abs=1e-6)
    assert vectors.scores(sums).numpy() == pytest.approx(weights @ dense @ dense.T, abs=1e-6)
    texts = [one for each in COUNTS for one in each]
    assert vectors.similarity(texts, sums[:, 0]) == pytest.approx((weights @ dense @ dense.T)[0] / 2, abs=1e-6)


def test_an_unknown_word_is_as_rare_as_one_in_a_single_image():
    vectors = CaptionVectors.from_counts([[{("dog",): 1}], [{("dog",): 1}], [{("cat",): 1}], [{("cat",): 1}]])
    total = vectors.weighted_sum(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))[:, 0]
    # the idf of "dog" is log 2, of "owl" log 4
    assert vectors.similarity([{("dog",): 1, ("owl",): 1}], total) == pytest.approx([5**-0.5])


def test_unknown_words_make_a_text_less_similar():
    vectors = CaptionVectors.from_counts(COUNTS)
    total = vectors.weighted_sum(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))[:, 0]
    pure, mixed, other = vectors.similarity([{("two",): 1}, {("two",): 1, ("owls",): 1}, {("owls",): 1}], total)
    assert pure > mixed > other == 0
