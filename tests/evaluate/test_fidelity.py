"""PSNR and SSIM against their definitions, and as sums that do not care about batches."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluate.metrics import FidelitySums, compare, ssim
from pipeline.features.statistics import mean_interval, wilson


def images(n: int, h: int = 16, w: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, h, w, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def noisy(x: torch.Tensor, spread: int, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (x.int() + torch.randint(-spread, spread + 1, x.shape, generator=g)).clamp(0, 255).to(torch.uint8)


def test_psnr_of_a_known_error() -> None:
    x = torch.full((2, 16, 16, 3), 100, dtype=torch.uint8)
    sums = compare(x, x + 5)
    expected = 10 * math.log10(255**2 / 25)
    assert sums.pooled_psnr_db() == pytest.approx(expected)
    assert sums.psnr_db.mean().value == pytest.approx(expected)


def test_perfect_round_trip_has_no_finite_psnr_and_ssim_one() -> None:
    x = images(3)
    sums = compare(x, x.clone())
    assert sums.pooled_psnr_db() is None
    assert sums.psnr_db.mean().value == 100.0
    assert sums.ssim.mean().value == pytest.approx(1.0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 5))
def test_sums_merge_to_those_of_the_whole(n: int, cut: int) -> None:
    x = images(n, seed=n)
    y = noisy(x, 20)
    cut = min(cut, n)
    whole, merged = compare(x, y), compare(x[:cut], y[:cut]) + compare(x[cut:], y[cut:])
    assert merged.n == whole.n == n
    assert merged.pooled_psnr_db() == pytest.approx(whole.pooled_psnr_db(), rel=1e-12)
    assert merged.ssim.mean().value == pytest.approx(whole.ssim.mean().value, rel=1e-6)
    assert merged.psnr_db.mean().high == pytest.approx(whole.psnr_db.mean().high, rel=1e-6, abs=1e-5)


def test_ssim_agrees_with_its_definition_window_by_window() -> None:
    x, y = images(1, 13, 14, seed=3), noisy(images(1, 13, 14, seed=3), 60)
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(3):
        a, b = (t[0, :, :, channel].numpy().astype(float) for t in (x, y))
        for top in range(3):
            for left in range(4):
                p, q = a[top : top + 11, left : left + 11], b[top : top + 11, left : left + 11]
                mp, mq = (weights * p).sum(), (weights * q).sum()
                vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
                cov = (weights * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert float(ssim(x, y)) == pytest.approx(np.mean(values), rel=1e-6)


def test_more_noise_is_less_fidelity() -> None:
    x = images(4, 32, 32)
    mild, strong = compare(x, noisy(x, 10)), compare(x, noisy(x, 60))
    assert mild.psnr_db.mean().low > strong.psnr_db.mean().high
    assert mild.ssim.mean().value > strong.ssim.mean().value


def test_unlike_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs need one shape"):
        compare(images(1), images(2))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs are uint8"):
        compare(images(1).float(), images(1))


def test_images_smaller_than_the_window_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 11 pixels a side, got 10x20"):
        ssim(images(1, 10, 20), images(1, 10, 20))


def test_no_images_have_no_psnr() -> None:
    with pytest.raises(ValueError, match="no PSNR of no images"):
        FidelitySums().pooled_psnr_db()


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341), (10, 10, 0.72247, 1.0), (90, 100, 0.82563, 0.94477)],
)
def test_wilson_interval_has_the_published_values(hits: int, n: int, low: float, high: float) -> None:
    estimate = wilson(hits, n)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=2e-5)


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_shares_that_are_none_are_refused(hits: int, n: int) -> None:
    with pytest.raises(ValueError, match="is no share"):
        wilson(hits, n)


def test_mean_interval_matches_the_textbook() -> None:
    x = np.array([1.0, 2.0, 4.0, 9.0])
    estimate = mean_interval(x.sum(), (x**2).sum(), 4)
    half = 1.959964 * x.std(ddof=1) / 2
    assert (estimate.value, estimate.low) == pytest.approx((4.0, 4.0 - half))
    assert mean_interval(3.0, 9.0, 1).low == 3.0
    with pytest.raises(ValueError, match="no mean of nothing"):
        mean_interval(0.0, 0.0, 0)
