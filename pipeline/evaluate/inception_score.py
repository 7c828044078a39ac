"""Inception score from sums that merge: exp of the mean divergence of each image's classes from all images'.

Salimans et al., "Improved techniques for training GANs", 2016, section 4. With p_i the class probabilities of
image i, the mean of KL(p_i | p) is (1/n) sum_i sum_c p_ic log p_ic - sum_c p_c log p_c: a scalar sum and a vector sum
are enough. Kept in the twenty blocks of the other statistics, for a jackknife interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.evaluate.intervals import Estimate, jackknifed
from pipeline.evaluate.stats import NUM_BLOCKS, Floats


@dataclass(frozen=True)
class ClassSums:
    """Of each block: images [b], sums of class probabilities [b, k], sums of p log p [b]."""

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
        """The score, from 1 (all images alike to the network) to k; infinite interval for few images."""
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
