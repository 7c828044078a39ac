"""How far samples are from real images in a feature space: Frechet distance, KID, precision and recall.

The features are those of whichever extractor looked at both sets. Of the classifier fitted on the reference images
they compare runs of one data set with each other, and are not comparable with published FID or KID, which use an
Inception network; given that network as the extractor, they are. Uncertainty of the two distances is a
delete-a-group jackknife over twenty blocks of images (Wolter, "Introduction to Variance Estimation", chapter 4): both
sets lose the same block of keys, and the spread of the twenty leave-one-out values gives the standard error.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.evaluate.intervals import Estimate, jackknifed, wilson
from pipeline.evaluate.stats import NUM_BLOCKS, FeatureStats, Floats, Moments

ROWS_AT_ONCE = 1024
Features = npt.NDArray[np.float32]


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
    dropped = [
        frechet_between(real.moments(without=b), generated.moments(without=b)) for b in _full_blocks(real, generated)
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


def _full_blocks(real: FeatureStats, generated: FeatureStats) -> list[int]:
    """Blocks that can be left out: each holds vectors, and both sides keep two or more without it."""
    sides = (real, generated)
    held = [b for b in range(NUM_BLOCKS) if any(s.blocks[b].n for s in sides)]
    return [b for b in held if all(s.n - s.blocks[b].n >= 2 for s in sides)]


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
