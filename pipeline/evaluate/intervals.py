"""Confidence intervals of shares and of means, in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054  # two-sided 95 % of the normal distribution
FEWEST_GROUPS = 10  # a jackknife over fewer groups says little: the interval is then infinite


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
