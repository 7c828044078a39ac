"""The inception score against its definition, its bounds, and as sums that merge."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.features.statistics import ClassSums, Sums, jackknifed, mean_interval


def keys(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, n, dtype=np.uint64)


def probabilities(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(k, 0.3), n)


def test_the_score_is_exp_of_the_mean_divergence() -> None:
    stats = pytest.importorskip("scipy.stats")
    p = probabilities(200, 6)
    divergences = [stats.entropy(row, p.mean(axis=0)) for row in p]
    score = ClassSums.of(keys(200), p).score()
    assert score.value == pytest.approx(math.exp(np.mean(divergences)), rel=1e-9)
    assert score.n == 200
    assert score.low < score.value < score.high


def test_its_bounds_are_one_and_the_number_of_classes() -> None:
    alike = np.tile([0.25, 0.75, 0.0], (100, 1))
    assert ClassSums.of(keys(100), alike).score().value == pytest.approx(1.0)
    sure = np.eye(5)[np.arange(100) % 5]
    assert ClassSums.of(keys(100), sure).score().value == pytest.approx(5.0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 80), max_size=3))
def test_sums_merge_to_those_of_the_whole(seed: int, cuts: list[int]) -> None:
    names, p = keys(80, seed), probabilities(80, 4, seed)
    whole = ClassSums.of(names, p).score()
    order = np.random.default_rng(seed).permutation(80)
    merged = ClassSums.of(names[:0], p[:0])
    for part in np.split(order, sorted(cuts)):
        merged = merged + ClassSums.of(names[part], p[part])
    again = merged.score()
    assert (again.value, again.low, again.high) == pytest.approx((whole.value, whole.low, whole.high), rel=1e-9)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth = ClassSums.of(keys(200_000), probabilities(200_000, 4, 99)).score().value
    hits = 0
    for seed in range(60):
        score = ClassSums.of(keys(2000, seed), probabilities(2000, 4, seed)).score()
        hits += score.low <= truth <= score.high
    assert 48 <= hits <= 60


def test_few_groups_have_no_interval() -> None:
    estimate = jackknifed(1.0, [1.0] * 9, 9)
    assert (estimate.low, estimate.high) == (-math.inf, math.inf)


def test_sums_of_values_are_their_mean() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    merged = Sums.of(values[:1]) + Sums.of(values[1:]) + Sums()
    assert merged.mean() == mean_interval(15.0, 85.0, 4)
    assert merged.mean().high - 3.75 == pytest.approx(1.959963984540054 * np.std(values, ddof=1) / 2)
