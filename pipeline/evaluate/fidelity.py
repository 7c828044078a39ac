"""What a codec loses: PSNR and SSIM of images against their round trip, as sums that merge by addition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as functional

from pipeline.evaluate.intervals import Estimate, mean_interval

PEAK = 255.0
PSNR_CEILING_DB = 100.0  # an identical pair has no finite PSNR; in the mean of images it counts as this
WINDOW = 11  # the constants of Wang et al. 2004, section III-C
SIGMA = 1.5
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


@dataclass(frozen=True)
class FidelitySums:
    """Sufficient statistics of a set of image pairs; `a + b` is the statistics of both sets."""

    n: int = 0
    values: int = 0
    squared_error: float = 0.0
    psnr: float = 0.0
    psnr_squared: float = 0.0
    ssim: float = 0.0
    ssim_squared: float = 0.0

    def __add__(self, other: FidelitySums) -> FidelitySums:
        return FidelitySums(
            self.n + other.n,
            self.values + other.values,
            self.squared_error + other.squared_error,
            self.psnr + other.psnr,
            self.psnr_squared + other.psnr_squared,
            self.ssim + other.ssim,
            self.ssim_squared + other.ssim_squared,
        )

    def pooled_psnr_db(self) -> float | None:
        """10 log10(255^2 / mean squared error over every value of every image); None for a perfect codec."""
        if self.values == 0:
            raise ValueError("there is no PSNR of no images")
        if self.squared_error == 0.0:
            return None
        return 10 * math.log10(PEAK**2 * self.values / self.squared_error)

    def mean_psnr_db(self) -> Estimate:
        """Mean over images of the PSNR of each, the figure papers on autoencoders print."""
        return mean_interval(self.psnr, self.psnr_squared, self.n)

    def mean_ssim(self) -> Estimate:
        """Mean over images of the SSIM of each, 1 for identical images."""
        return mean_interval(self.ssim, self.ssim_squared, self.n)


def compare(images_NHWC: torch.Tensor, decoded_NHWC: torch.Tensor) -> FidelitySums:
    """The sums of one batch of pairs, uint8 [n,h,w,3] each; h and w at least 11."""
    if images_NHWC.shape != decoded_NHWC.shape or images_NHWC.ndim != 4:
        raise ValueError(
            f"pairs need one shape [n,h,w,c], got {list(images_NHWC.shape)} and {list(decoded_NHWC.shape)}"
        )
    if images_NHWC.dtype != torch.uint8 or decoded_NHWC.dtype != torch.uint8:
        raise ValueError(f"pairs are uint8, got {images_NHWC.dtype} and {decoded_NHWC.dtype}")
    x, y = images_NHWC.double(), decoded_NHWC.double()
    error_N = (x - y).square().mean(dim=(1, 2, 3))
    floor = PEAK**2 / 10 ** (PSNR_CEILING_DB / 10)
    psnr_N = 10 * torch.log10(PEAK**2 / error_N.clamp_min(floor))
    ssim_N = ssim(images_NHWC, decoded_NHWC)
    return FidelitySums(
        n=len(x),
        values=x.numel(),
        squared_error=float((x - y).square().sum()),
        psnr=float(psnr_N.sum()),
        psnr_squared=float(psnr_N.square().sum()),
        ssim=float(ssim_N.sum()),
        ssim_squared=float(ssim_N.square().sum()),
    )


def ssim(images_NHWC: torch.Tensor, decoded_NHWC: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each pair, float64 [n]: mean over colour channels and over whole windows.

    Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural
    similarity", IEEE TIP 13 (2004), equation 13, with an 11 x 11 Gaussian window of sigma 1.5, K1 = 0.01, K2
    = 0.03, L = 255; no padding, so windows that would leave the image do not count. Raises ValueError for
    images under 11 pixels.
    """
    n, h, w, c = images_NHWC.shape
    if min(h, w) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW} pixels a side, got {h}x{w}")
    x, y = (t.double().permute(0, 3, 1, 2).reshape(n * c, 1, h, w) for t in (images_NHWC, decoded_NHWC))
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    windows = luminance * structure
    return windows.reshape(n, c, *windows.shape[2:]).mean(dim=(1, 2, 3))


def _blur(x: torch.Tensor) -> torch.Tensor:
    """Gaussian-weighted mean over windows, separable, without padding."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()
    rows = functional.conv2d(x, weights.view(1, 1, 1, WINDOW))
    return functional.conv2d(rows, weights.view(1, 1, WINDOW, 1))
