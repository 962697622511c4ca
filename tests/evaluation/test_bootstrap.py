"""Bootstrap intervals: their width against theory, their pairing, and clusters."""

from __future__ import annotations

import numpy as np
import pytest

from frozenprefix.errors import DataError
from frozenprefix.evaluation.bootstrap import bootstrap_interval, paired_bootstrap


@pytest.fixture
def scores():
    return np.random.default_rng(0).normal(loc=0.5, scale=0.2, size=400)


def test_interval_is_as_wide_as_theory_says(scores):
    interval = bootstrap_interval(scores)
    assert interval.value == pytest.approx(scores.mean())
    half = 1.96 * scores.std() / np.sqrt(len(scores))
    assert interval.low == pytest.approx(scores.mean() - half, abs=half / 5)
    assert interval.high == pytest.approx(scores.mean() + half, abs=half / 5)
    narrower = bootstrap_interval(scores, confidence=0.5)
    assert interval.low < narrower.low < interval.value < narrower.high < interval.high


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        interval = bootstrap_interval(rng.normal(size=60), n=200, seed=trial)
        covered += interval.low <= 0 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_same_seed_same_interval(scores):
    assert bootstrap_interval(scores, seed=3) == bootstrap_interval(scores, seed=3)
    assert bootstrap_interval(scores, seed=3) != bootstrap_interval(scores, seed=4)


def test_a_metric_of_sums():
    """A ratio of sums is no mean of ratios: the two samples have 1/1 and 0/9."""
    interval = bootstrap_interval([[1, 1], [0, 9]], lambda sums: sums[:, 0] / sums[:, 1], n=500)
    assert interval.value == pytest.approx(0.1)
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_clusters_widen_the_interval(scores):
    """Ten copies of each sample know no more than one."""
    copied, clusters = np.repeat(scores, 10), np.repeat(np.arange(len(scores)), 10).tolist()
    blind, right = bootstrap_interval(copied), bootstrap_interval(copied, clusters=clusters)
    alone = bootstrap_interval(scores)
    assert right.high - right.low == pytest.approx(alone.high - alone.low)
    assert blind.high - blind.low < 0.5 * (right.high - right.low)


def test_clusters_of_different_sizes_keep_the_mean():
    interval = bootstrap_interval([1.0, 1.0, 1.0, 0.0], clusters=["a", "a", "a", "b"])
    assert interval.value == 0.75


def test_pairing_finds_what_single_intervals_hide(scores):
    better = scores + 0.01 + np.random.default_rng(2).normal(scale=0.01, size=len(scores))
    first, second = bootstrap_interval(scores), bootstrap_interval(better)
    assert first.high > second.low, "the intervals overlap"
    paired = paired_bootstrap(scores, better)
    assert paired.difference == pytest.approx(better.mean() - scores.mean())
    assert 0 < paired.low < paired.difference < paired.high
    assert paired.p_value == pytest.approx(2 / 1001), "as small as 1000 draws can tell"
    turned = paired_bootstrap(better, scores)
    assert turned.difference == -paired.difference
    assert turned.p_value == paired.p_value


def test_no_difference_is_not_significant(scores):
    assert paired_bootstrap(scores, scores).p_value == 1.0
    noise = scores + np.random.default_rng(3).normal(scale=0.1, size=len(scores))
    assert paired_bootstrap(scores, noise).p_value > 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([]), "at least one sample"),
        (lambda: bootstrap_interval([1.0, float("nan")]), "1 values are not finite"),
        (lambda: bootstrap_interval([[1.0, 2.0]]), r"must be \[samples\] without a metric, got shape \[1, 2\]"),
        (lambda: bootstrap_interval([1.0], n=0), "n must be ≥ 1, got 0"),
        (lambda: bootstrap_interval([1.0], confidence=95), "confidence must lie between 0 and 1, got 95"),
        (lambda: bootstrap_interval([1.0], clusters=[]), "clusters must have one entry per sample, 1; got 0"),
        (lambda: paired_bootstrap([1.0], [1.0, 2.0]), "got 1 and 2 samples"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(DataError, match=message):
        call()
