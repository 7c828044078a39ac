"""Quality figures against closed forms, brute force and known limits; statistics that merge in any order."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from pipeline.features.statistics import (
    FeatureStats,
    Moments,
    StatsBuilder,
    Vectors,
    frechet,
    frechet_between,
    kid,
    precision_recall,
)

LIMIT = 2_000


def stats_of(features: npt.NDArray[np.floating], seed: int = 0, limit: int = LIMIT) -> FeatureStats:
    keys = np.random.default_rng(seed).integers(0, 2**63, len(features), dtype=np.uint64)
    return FeatureStats.of(keys, features.astype(np.float32), limit)


def gaussian(n: int, d: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).normal(mean, scale, (n, d))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 60), max_size=3), st.integers(1, 40))
def test_statistics_do_not_depend_on_batches_or_order(seed: int, cuts: list[int], limit: int) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.permutation(10_000)[:60].astype(np.uint64) * np.uint64(1_000_003)
    features = (rng.normal(size=(60, 5)) + 100).astype(np.float32)
    whole = FeatureStats.of(keys, features, limit)
    order = rng.permutation(60)
    merged = FeatureStats.empty(5, limit)
    for part in np.split(order, sorted(cuts)):
        merged = merged + FeatureStats.of(keys[part], features[part], limit)
    np.testing.assert_array_equal(merged.keys_M, whole.keys_M)
    np.testing.assert_array_equal(merged.features_MD, whole.features_MD)
    np.testing.assert_allclose(merged.moments().mean_D, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.moments().covariance(), np.cov(features.T.astype(np.float64)), atol=1e-9)


class Given(nn.Module):
    """Hands on the feature vectors that come in place of images."""

    num_features = 6

    def forward(self, features_ND: torch.Tensor) -> torch.Tensor:
        return features_ND


def test_frechet_distance_and_kid_are_those_of_torchmetrics_on_the_same_features() -> None:
    mixing = gaussian(6, 6, seed=3)
    real, drawn = gaussian(300, 6, seed=1) @ mixing, gaussian(200, 6, seed=2, mean=0.3) @ mixing
    fid = FrechetInceptionDistance(feature=Given(), input_img_size=(6,)).set_dtype(torch.float64)
    with pytest.warns(UserWarning, match="save all extracted features"):
        kernel = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=200)
    for features, is_real in ((real, True), (drawn, False)):
        rows = torch.from_numpy(features[:200].astype(np.float32))
        kernel.update(rows, real=is_real)
        for part in torch.from_numpy(features.astype(np.float32)).split(64):
            fid.update(part, real=is_real)
    ours = frechet(stats_of(real), stats_of(drawn, seed=9))
    assert ours.value == pytest.approx(float(fid.compute()), rel=1e-5)
    ours = kid(stats_of(real[:200]), stats_of(drawn, seed=9))
    assert ours.value == pytest.approx(float(kernel.compute()[0]), rel=1e-4)


def test_statistics_survive_being_written_as_arrays() -> None:
    stats = stats_of(gaussian(300, 6, seed=1), limit=50)
    again = FeatureStats.from_arrays(stats.arrays(), limit=50)
    assert frechet(stats, again).value == pytest.approx(0.0, abs=1e-9)
    np.testing.assert_array_equal(again.keys_M, stats.keys_M)


def test_frechet_of_diagonal_gaussians_is_the_closed_form() -> None:
    a = Moments(101, np.array([1.0, 2.0]), np.diag([4.0, 9.0]) * 100)
    b = Moments(101, np.array([0.0, 0.0]), np.diag([1.0, 16.0]) * 100)
    assert frechet_between(a, b) == pytest.approx(5.0 + (2 - 1) ** 2 + (3 - 4) ** 2)


def test_frechet_agrees_with_the_matrix_square_root() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a, b = (Moments.of(gaussian(200, 8, s) @ gaussian(8, 8, s + 10)) for s in (1, 2))
    root = linalg.sqrtm(a.covariance() @ b.covariance()).real
    gap = a.mean_D - b.mean_D
    expected = gap @ gap + np.trace(a.covariance() + b.covariance() - 2 * root)
    assert frechet_between(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_takes_singular_covariances() -> None:
    flat = gaussian(50, 4, 3)
    flat[:, 2:] = 0.0
    assert frechet_between(Moments.of(flat), Moments.of(flat)) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.integration
def test_frechet_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    # mean gap 1 in each of 2 dimensions, equal covariances: the true distance is 2
    hits = 0
    for trial in range(60):
        real, fake = (
            stats_of(gaussian(600, 2, trial), 1),
            stats_of(gaussian(600, 2, 1_000 + trial, mean=1.0), 2),
        )
        estimate = frechet(real, fake)
        hits += estimate.low <= 2.0 <= estimate.high
    assert 50 <= hits <= 60


def test_covariance_of_one_vector_is_refused() -> None:
    with pytest.raises(ValueError, match="needs two vectors, got 1"):
        Moments.of(np.zeros((1, 3))).covariance()


def test_kid_is_the_unbiased_estimator_of_its_definition() -> None:
    x, y = gaussian(40, 3, 1).astype(np.float32), gaussian(30, 3, 2, mean=0.5).astype(np.float32)

    def kernel(p: npt.NDArray[np.float32], q: npt.NDArray[np.float32]) -> float:
        return float((p.astype(float) @ q.astype(float) / 3 + 1) ** 3)

    xx = sum(kernel(x[i], x[j]) for i in range(40) for j in range(40) if i != j) / (40 * 39)
    yy = sum(kernel(y[i], y[j]) for i in range(30) for j in range(30) if i != j) / (30 * 29)
    xy = sum(kernel(p, q) for p in x for q in y) / (40 * 30)
    assert kid(stats_of(x), stats_of(y, 1)).value == pytest.approx(xx + yy - 2 * xy, rel=1e-9)


def test_kid_tells_the_same_from_another_distribution() -> None:
    real = stats_of(gaussian(1_500, 8, 1), 1)
    same = kid(real, stats_of(gaussian(1_500, 8, 2), 2))
    other = kid(real, stats_of(gaussian(1_500, 8, 3, mean=0.3), 3))
    assert same.low <= 0.0 <= same.high
    assert other.low > same.high


def test_kid_of_almost_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="KID needs two vectors"):
        kid(stats_of(gaussian(1, 3, 1)), stats_of(gaussian(9, 3, 1)))


def test_precision_and_recall_see_lost_modes_and_invented_ones() -> None:
    real = np.concatenate([gaussian(300, 4, 1, -10), gaussian(300, 4, 2, 10)])
    one_mode = gaussian(600, 4, 3, -10)
    precision, recall = precision_recall(stats_of(real), stats_of(one_mode, 1))
    assert precision.value > 0.8
    assert recall.value < 0.6
    precision, recall = precision_recall(stats_of(one_mode), stats_of(real, 1))
    assert precision.value < 0.6
    assert recall.value > 0.8


def test_precision_of_a_set_against_itself_is_one() -> None:
    stats = stats_of(gaussian(100, 4, 1))
    precision, recall = precision_recall(stats, stats)
    assert precision.value == recall.value == 1.0


def test_precision_agrees_with_brute_force() -> None:
    x, y = gaussian(50, 3, 1).astype(np.float32), gaussian(50, 3, 2, 0.5).astype(np.float32)
    a, b = stats_of(x), stats_of(y, 1)
    distance = np.linalg.norm(x[:, None].astype(float) - x[None].astype(float), axis=-1)
    radius = np.sort(distance, axis=1)[:, 3]
    inside = (np.linalg.norm(y[:, None].astype(float) - x[None].astype(float), axis=-1) <= radius).any(axis=1)
    assert precision_recall(a, b)[0].value == pytest.approx(inside.mean())


def test_too_few_vectors_for_a_manifold_are_refused() -> None:
    with pytest.raises(ValueError, match="need more than 3 vectors, got 3"):
        precision_recall(stats_of(gaussian(3, 2, 1)), stats_of(gaussian(9, 2, 1)))


def test_statistics_of_unlike_limits_do_not_merge() -> None:
    with pytest.raises(ValueError, match="keep 5 and 6 vectors"):
        FeatureStats.empty(2, 5) + FeatureStats.empty(2, 6)


def test_vectors_in_parts_are_folded_to_the_statistics_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.features.statistics.FOLDED_ROWS", 20)
    x = gaussian(110, 4, 8).astype(np.float32)
    keys = np.random.default_rng(3).permutation(110).astype(np.uint64)
    parts = [Vectors(keys[at : at + 7], x[at : at + 7]) for at in range(0, 110, 7)]
    found = []
    for _ in range(2):
        builder = StatsBuilder(30)
        assert builder.stats() is None
        for part in parts:
            builder.add(part)
        stats = builder.stats()
        assert stats is not None
        assert builder.stats() is stats
        found.append(stats)
    whole = FeatureStats.of(keys, x, 30)
    assert np.array_equal(found[0].keys_M, whole.keys_M)
    assert np.array_equal(found[0].features_MD, whole.features_MD)
    for name, array in found[0].arrays().items():
        assert np.array_equal(array, found[1].arrays()[name])
        np.testing.assert_allclose(array, whole.arrays()[name], rtol=1e-12, atol=1e-12)


def test_keys_and_vectors_must_pair() -> None:
    with pytest.raises(ValueError, match="2 keys for 3 vectors"):
        FeatureStats.of(np.zeros(2, np.uint64), np.zeros((3, 2), np.float32), 5)


def test_too_little_data_gives_an_unbounded_interval_and_not_a_narrow_one() -> None:
    estimate = frechet(stats_of(gaussian(2, 2, 1)), stats_of(gaussian(2, 2, 2), 1))
    assert (estimate.low, estimate.high) == (-np.inf, np.inf)


def test_kid_is_the_unbiased_mmd_of_scikit_learns_kernel() -> None:
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    x, y = gaussian(60, 5, 1).astype(np.float32), gaussian(50, 5, 2, mean=0.3).astype(np.float32)
    xx, yy, xy = (
        pairwise.polynomial_kernel(a.astype(np.float64), b.astype(np.float64), degree=3, gamma=1 / 5, coef0=1)
        for a, b in ((x, x), (y, y), (x, y))
    )
    n, m = len(x), len(y)
    expected = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1)) - 2 * xy.mean()
    assert kid(stats_of(x, 1), stats_of(y, 2)).value == pytest.approx(expected, rel=1e-9)


def test_precision_and_recall_agree_with_scikit_learns_neighbours() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, y = gaussian(80, 4, 3), gaussian(80, 4, 4, mean=0.8)
    real, generated = stats_of(x, 5), stats_of(y, 6)

    def share(queries: npt.NDArray[np.float32], manifold: npt.NDArray[np.float32]) -> float:
        tree = neighbors.NearestNeighbors(n_neighbors=4).fit(manifold)  # a vector is its own first neighbour
        radii = tree.kneighbors(manifold)[0][:, 3]
        distances = np.linalg.norm(queries[:, None] - manifold[None], axis=2)
        return float((distances <= radii[None]).any(axis=1).mean())

    precision, recall = precision_recall(real, generated, neighbours=3)
    assert precision.value == pytest.approx(share(generated.features_MD, real.features_MD))
    assert recall.value == pytest.approx(share(real.features_MD, generated.features_MD))
