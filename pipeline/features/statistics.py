"""Sets of images as statistics that merge by addition, and figures of them with 95 % intervals. No torch.

Shares and means have intervals in closed form. Of feature vectors two parts are kept: mean and covariance in twenty
blocks (a vector's block follows from its key), which give the Frechet distance and, by leaving out one block at a
time, its uncertainty (a delete-a-group jackknife; Wolter, "Introduction to Variance Estimation", chapter 4); and a
bounded choice of the vectors themselves, those with the smallest keys, for figures that need pairs. Keys are hashes
of what an image is, so both parts are the same whatever the order, the batches or the number of workers, up to
rounding of the sums.

Features are those of whichever network looked at both sets. Those of the classifier fitted on the reference images
compare runs of one data set with each other, and are not comparable with published FID or KID, which use an Inception
network: see `fid` in the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Z_95 = 1.959963984540054  # two-sided 95 % of the normal distribution
FEWEST_GROUPS = 10  # a jackknife over fewer groups says little: the interval is then infinite
NUM_BLOCKS = 20
ROWS_AT_ONCE = 1024  # of a matrix of pairs
FOLDED_ROWS = 4096
Floats = npt.NDArray[np.float64]
Features = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval and the number of independent things it was taken from."""

    value: float
    low: float
    high: float
    n: int


def wilson(hits: int, n: int) -> Estimate:
    """A share with Wilson's score interval, which stays inside [0, 1] and is right near its ends.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    Raises ValueError unless 0 <= hits <= n and n > 0.
    """
    if n <= 0 or not 0 <= hits <= n:
        raise ValueError(f"{hits} hits of {n} is no share")
    share, z2 = hits / n, Z_95 * Z_95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    low = 0.0 if hits == 0 else centre - half
    high = 1.0 if hits == n else centre + half
    return Estimate(share, low, high, n)


def mean_interval(total: float, total_of_squares: float, n: int) -> Estimate:
    """A mean with its normal interval from the sums of x and of x squared; one value alone has no width."""
    if n <= 0:
        raise ValueError("there is no mean of nothing")
    mean = total / n
    variance = max(total_of_squares - n * mean * mean, 0.0) / (n - 1) if n > 1 else 0.0
    half = Z_95 * math.sqrt(variance / n)
    return Estimate(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class Sums:
    """Sufficient statistics of the mean of some values; `a + b` is the statistics of both."""

    n: int = 0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Iterable[float]) -> Sums:
        numbers = [float(v) for v in values]
        return cls(len(numbers), math.fsum(numbers), math.fsum(v * v for v in numbers))

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.n + other.n, self.total + other.total, self.squares + other.squares)

    def mean(self) -> Estimate:
        """Their mean with a normal interval; ValueError when there are none."""
        return mean_interval(self.total, self.squares, self.n)


def jackknifed(value: float, dropped: Sequence[float], n: int) -> Estimate:
    """A figure with the interval that its leave-one-group-out values give (Wolter, chapter 4)."""
    groups = len(dropped)
    if groups < FEWEST_GROUPS:
        return Estimate(value, -math.inf, math.inf, n)
    mean = math.fsum(dropped) / groups
    variance = (groups - 1) / groups * math.fsum((v - mean) ** 2 for v in dropped)
    half = Z_95 * math.sqrt(variance)
    return Estimate(value, value - half, value + half, n)


@dataclass(frozen=True)
class Moments:
    """Count, mean [d] and sum of squared deviations [d,d] of vectors, float64.

    Merging is the pairwise update of Chan, Golub, LeVeque, "Algorithms for computing the sample variance",
    The American Statistician 37 (1983), which does not lose digits as raw sums of squares do.
    """

    n: int
    mean_D: Floats
    scatter_DD: Floats

    @classmethod
    def of(cls, features_ND: npt.NDArray[np.floating]) -> Moments:
        x_ND = np.asarray(features_ND, np.float64)
        if len(x_ND) == 0:
            return cls.empty(x_ND.shape[1])
        mean_D = x_ND.mean(axis=0)
        centred_ND = x_ND - mean_D
        return cls(len(x_ND), mean_D, centred_ND.T @ centred_ND)

    @classmethod
    def empty(cls, dims: int) -> Moments:
        return cls(0, np.zeros(dims), np.zeros((dims, dims)))

    def __add__(self, other: Moments) -> Moments:
        n = self.n + other.n
        if n == 0:
            return self
        gap_D = other.mean_D - self.mean_D
        mean_D = self.mean_D + gap_D * (other.n / n)
        between_DD = np.outer(gap_D, gap_D) * (self.n * other.n / n)
        return Moments(n, mean_D, self.scatter_DD + other.scatter_DD + between_DD)

    def covariance(self) -> Floats:
        """Unbiased covariance [d,d]; raises ValueError for fewer than two vectors."""
        if self.n < 2:
            raise ValueError(f"a covariance needs two vectors, got {self.n}")
        return self.scatter_DD / (self.n - 1)


@dataclass(frozen=True)
class FeatureStats:
    """Everything the quality figures need of one set of images.

    blocks: moments of each of NUM_BLOCKS key blocks. keys [m] uint64 ascending and features_MD [m,d] float32:
    the vectors of the `limit` smallest keys, m <= limit.
    """

    blocks: tuple[Moments, ...]
    keys_M: npt.NDArray[np.uint64]
    features_MD: npt.NDArray[np.float32]
    limit: int

    @classmethod
    def empty(cls, dims: int, limit: int) -> FeatureStats:
        blocks = tuple(Moments.empty(dims) for _ in range(NUM_BLOCKS))
        return cls(blocks, np.zeros(0, np.uint64), np.zeros((0, dims), np.float32), limit)

    @classmethod
    def of(cls, keys_N: npt.NDArray[np.uint64], features_ND: npt.NDArray[np.float32], limit: int) -> FeatureStats:
        """Statistics of one batch; two images with one key are two images."""
        if len(keys_N) != len(features_ND):
            raise ValueError(f"{len(keys_N)} keys for {len(features_ND)} vectors")
        block_N = keys_N % np.uint64(NUM_BLOCKS)
        blocks = tuple(Moments.of(features_ND[block_N == np.uint64(b)]) for b in range(NUM_BLOCKS))
        keys_M, features_MD = _smallest(keys_N, features_ND, limit)
        return cls(blocks, keys_M, features_MD, limit)

    def __add__(self, other: FeatureStats) -> FeatureStats:
        if self.limit != other.limit:
            raise ValueError(f"statistics that keep {self.limit} and {other.limit} vectors do not merge")
        keys_M, features_MD = _smallest(
            np.concatenate([self.keys_M, other.keys_M]),
            np.concatenate([self.features_MD, other.features_MD]),
            self.limit,
        )
        blocks = tuple(a + b for a, b in zip(self.blocks, other.blocks, strict=True))
        return FeatureStats(blocks, keys_M, features_MD, self.limit)

    @property
    def n(self) -> int:
        return sum(block.n for block in self.blocks)

    @property
    def dims(self) -> int:
        return int(self.features_MD.shape[1])

    def moments(self, *, without: int | None = None) -> Moments:
        """All vectors' moments, or all but those of one block."""
        total = Moments.empty(self.dims)
        for index, block in enumerate(self.blocks):
            if index != without:
                total = total + block
        return total

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """The statistics as named arrays, for safetensors; `from_arrays` is the inverse."""
        return {
            "n": np.array([block.n for block in self.blocks], np.int64),
            "mean": np.stack([block.mean_D for block in self.blocks]),
            "scatter": np.stack([block.scatter_DD for block in self.blocks]),
            "keys": self.keys_M.view(np.int64),
            "features": self.features_MD,
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[np.generic]], limit: int) -> FeatureStats:
        blocks = tuple(
            Moments(int(n), mean_D, scatter_DD)
            for n, mean_D, scatter_DD in zip(
                np.asarray(arrays["n"], np.int64),
                np.asarray(arrays["mean"], np.float64),
                np.asarray(arrays["scatter"], np.float64),
                strict=True,
            )
        )
        keys_M = np.asarray(arrays["keys"], np.int64).view(np.uint64)
        return cls(blocks, keys_M, np.asarray(arrays["features"], np.float32), limit)


@dataclass(frozen=True)
class Vectors:
    """Feature vectors of some images and the keys that name these: uint64 [n], float32 [n, d]."""

    keys_N: npt.NDArray[np.uint64]
    features_ND: Features

    @classmethod
    def joined(cls, parts: Sequence[Vectors]) -> Vectors:
        """Those of all parts, one after the other; there is at least one."""
        keys, features = ([getattr(part, name) for part in parts] for name in ("keys_N", "features_ND"))
        return cls(np.concatenate(keys), np.concatenate(features))


class StatsBuilder:
    """Statistics of vectors that come in parts: the same parts in the same order give the same bits.

    They are added FOLDED_ROWS at a time: for 2,048 features the sums of the blocks take 671 MB, and adding to them
    takes as long for one vector as for thousands.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._stats: FeatureStats | None = None
        self._waiting: list[Vectors] = []

    def add(self, part: Vectors) -> None:
        """One part more."""
        self._waiting.append(part)
        if sum(len(waiting.keys_N) for waiting in self._waiting) >= FOLDED_ROWS:
            self.stats()

    def stats(self) -> FeatureStats | None:
        """Of everything that came; None where nothing did."""
        if self._waiting:
            joined = Vectors.joined(self._waiting)
            folded = FeatureStats.of(joined.keys_N, joined.features_ND, self._limit)
            self._stats = folded if self._stats is None else self._stats + folded
            self._waiting = []
        return self._stats


def _smallest(
    keys_N: npt.NDArray[np.uint64], features_ND: npt.NDArray[np.float32], limit: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float32]]:
    order = np.argsort(keys_N, kind="stable")[:limit]
    return keys_N[order], np.ascontiguousarray(features_ND[order], np.float32)


@dataclass(frozen=True)
class ClassSums:
    """Class probabilities of images, for the inception score.

    Of each block: images [b], sums of class probabilities [b, k], sums of p log p [b].
    """

    n_B: npt.NDArray[np.int64]
    mass_BK: Floats
    negentropy_B: Floats

    @classmethod
    def of(cls, keys_N: npt.NDArray[np.uint64], probabilities_NK: npt.NDArray[np.floating]) -> ClassSums:
        p = np.asarray(probabilities_NK, np.float64)
        block_N = (keys_N % np.uint64(NUM_BLOCKS)).astype(np.int64)
        select_BN = (np.arange(NUM_BLOCKS)[:, None] == block_N[None, :]).astype(np.float64)
        return cls(select_BN.sum(1).astype(np.int64), select_BN @ p, select_BN @ _plogp(p).sum(axis=1))

    def __add__(self, other: ClassSums) -> ClassSums:
        return ClassSums(self.n_B + other.n_B, self.mass_BK + other.mass_BK, self.negentropy_B + other.negentropy_B)

    def score(self) -> Estimate:
        """Inception score: exp of the mean divergence of each image's classes from all images', from 1 to k.

        Salimans et al., "Improved techniques for training GANs", 2016, section 4. With p_i the probabilities of image
        i, the mean of KL(p_i | p) is (1/n) sum_i sum_c p_ic log p_ic - sum_c p_c log p_c: a scalar and a vector are
        enough. The interval is infinite for few images.
        """
        every = np.ones(NUM_BLOCKS, bool)
        dropped = []
        for block in np.flatnonzero(self.n_B):
            kept = every.copy()
            kept[block] = False
            if self.n_B[kept].sum():
                dropped.append(self._score(kept))
        return jackknifed(self._score(every), dropped, int(self.n_B.sum()))

    def _score(self, kept: npt.NDArray[np.bool_]) -> float:
        n = self.n_B[kept].sum()
        mean_K = self.mass_BK[kept].sum(axis=0) / n
        return math.exp(self.negentropy_B[kept].sum() / n - _plogp(mean_K).sum())


def _plogp(p: Floats) -> Floats:
    out: Floats = p * np.log(np.where(p > 0, p, 1.0))
    return out


def frechet_between(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two Gaussians with these means and covariances.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), Dowson and Landau 1982, as used on network features by
    Heusel et al., "GANs trained by a two time-scale update rule", 2017, equation 6. The trace of the root is
    taken as the sum of roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric, so nothing complex
    appears.
    """
    covariance_a, covariance_b = a.covariance(), b.covariance()
    values, vectors = np.linalg.eigh(covariance_a)
    root_a = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root_a @ covariance_b @ root_a)
    gap_D = a.mean_D - b.mean_D
    trace = np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(np.clip(cross, 0.0, None)).sum()
    return max(float(gap_D @ gap_D + trace), 0.0)


def frechet(real: FeatureStats, generated: FeatureStats) -> Estimate:
    """The Frechet distance of two sets with a jackknife interval.

    The estimate is biased upwards for small n: compare it at equal n only. With too few images to say
    anything about uncertainty the interval is infinite.
    """
    value = frechet_between(real.moments(), generated.moments())
    sides = (real, generated)
    dropped = [
        frechet_between(real.moments(without=b), generated.moments(without=b))
        for b in range(NUM_BLOCKS)
        if any(s.blocks[b].n for s in sides) and all(s.n - s.blocks[b].n >= 2 for s in sides)
    ]
    return jackknifed(value, dropped, min(real.n, generated.n))


def kid(real: FeatureStats, generated: FeatureStats) -> Estimate:
    """Kernel distance: unbiased squared MMD with the kernel (x.y / d + 1)^3, over the vectors kept.

    Binkowski, Sutherland, Arbel, Gretton, "Demystifying MMD GANs", 2018, eq. 4. Unbiased for independent draws, so
    it may be slightly negative for sets of one distribution; more so for small sets drawn evenly over classes, which
    are more regular than independent draws. Raises ValueError for fewer than two vectors on a side.
    """
    sides = (real, generated)
    counts = [np.bincount(_block_of(s), minlength=NUM_BLOCKS).astype(np.float64) for s in sides]
    if min(c.sum() for c in counts) < 2:
        raise ValueError("KID needs two vectors on each side")
    within = [_kernel_sums(s, s, same=True) for s in sides]
    between = _kernel_sums(real, generated, same=False)

    def estimate(kept: npt.NDArray[np.bool_]) -> float:
        sums = [w[np.ix_(kept, kept)].sum() for w in within]
        n, m = (c[kept].sum() for c in counts)
        cross = between[np.ix_(kept, kept)].sum()
        return float(sums[0] / (n * (n - 1)) + sums[1] / (m * (m - 1)) - 2 * cross / (n * m))

    every = np.ones(NUM_BLOCKS, bool)
    dropped = []
    for block in range(NUM_BLOCKS):
        kept = every.copy()
        kept[block] = False
        if sum(c[block] for c in counts) == 0:
            continue
        if min(c[kept].sum() for c in counts) >= 2:
            dropped.append(estimate(kept))
    return jackknifed(estimate(every), dropped, int(min(c.sum() for c in counts)))


def precision_recall(
    real: FeatureStats, generated: FeatureStats, *, neighbours: int = 3
) -> tuple[Estimate, Estimate]:
    """Share of generated vectors inside the real manifold, and of real vectors inside the generated one.

    Kynkaanniemi et al., "Improved precision and recall metric for assessing generative models", 2019,
    equations 1 to 3: the manifold of a set is the union of balls around its vectors that reach to their k-th
    neighbour. Both sides are cut to one number of vectors, since the figure depends on it. Wilson intervals:
    they cover the choice of images asked about, not that of the manifold.
    """
    n = min(len(real.features_MD), len(generated.features_MD))
    if n <= neighbours:
        raise ValueError(f"precision and recall with k = {neighbours} need more than {neighbours} vectors, got {n}")
    x, y = real.features_MD[:n], generated.features_MD[:n]
    precision = _share_inside(y, x, _radii(x, neighbours))
    recall = _share_inside(x, y, _radii(y, neighbours))
    return wilson(precision, n), wilson(recall, n)


def _block_of(stats: FeatureStats) -> npt.NDArray[np.int64]:
    return (stats.keys_M % np.uint64(NUM_BLOCKS)).astype(np.int64)


def _kernel_sums(a: FeatureStats, b: FeatureStats, *, same: bool) -> Floats:
    """Sums of the cubic kernel by pair of blocks [NUM_BLOCKS, NUM_BLOCKS]; `same` leaves out the diagonal."""
    x, y = a.features_MD.astype(np.float64), b.features_MD.astype(np.float64)
    rows_of, columns_of = _block_of(a), _block_of(b)
    select = np.eye(NUM_BLOCKS)[columns_of]  # [m, blocks]: sums columns by block
    sums = np.zeros((NUM_BLOCKS, NUM_BLOCKS))
    for start in range(0, len(x), ROWS_AT_ONCE):
        part = x[start : start + ROWS_AT_ONCE]
        kernel = (part @ y.T / a.dims + 1.0) ** 3
        if same:
            index = np.arange(len(part))
            kernel[index, start + index] = 0.0
        np.add.at(sums, rows_of[start : start + ROWS_AT_ONCE], kernel @ select)
    return sums


def _squared_distances(x_ND: Floats, y_MD: Floats) -> Floats:
    squares: Floats = (x_ND**2).sum(1)[:, None] + (y_MD**2).sum(1)[None, :] - 2 * x_ND @ y_MD.T
    np.maximum(squares, 0.0, out=squares)
    return squares


def _radii(x_MD: Features, neighbours: int) -> Floats:
    """Squared distance of each vector to its k-th nearest other."""
    x = x_MD.astype(np.float64)
    parts = []
    for start in range(0, len(x), ROWS_AT_ONCE):
        squares = _squared_distances(x[start : start + ROWS_AT_ONCE], x)
        index = np.arange(len(squares))
        squares[index, start + index] = np.inf
        parts.append(np.partition(squares, neighbours - 1, axis=1)[:, neighbours - 1])
    return np.concatenate(parts)


def _share_inside(queries_MD: Features, manifold_MD: Features, radii_M: Floats) -> int:
    manifold = manifold_MD.astype(np.float64)
    inside = 0
    for start in range(0, len(queries_MD), ROWS_AT_ONCE):
        part = queries_MD[start : start + ROWS_AT_ONCE].astype(np.float64)
        inside += int((_squared_distances(part, manifold) <= radii_M[None, :]).any(axis=1).sum())
    return inside
