"""Sufficient statistics of a set of feature vectors: they merge, so no set of images has to be in one memory.

Two parts. Mean and covariance in twenty blocks (a vector's block follows from its key), which give the
Frechet distance and, by leaving out one block at a time, its uncertainty. And a bounded choice of the vectors
themselves, those with the smallest keys, for figures that need pairs. Keys are hashes of what an image is, so
both parts are the same whatever the order, the batches or the number of workers, up to rounding of the sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_BLOCKS = 20
Floats = npt.NDArray[np.float64]


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


def _smallest(
    keys_N: npt.NDArray[np.uint64], features_ND: npt.NDArray[np.float32], limit: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float32]]:
    order = np.argsort(keys_N, kind="stable")[:limit]
    return keys_N[order], np.ascontiguousarray(features_ND[order], np.float32)
