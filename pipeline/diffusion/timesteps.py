"""Densities of training times, as transforms of a uniform number, so that a time is keyed like any other draw.

`TimestepDensity.times(u)` is the inverse of the density's distribution function: u from `rng.keyed_uniform` gives
training times, u = (i + 1/2) / n gives the stratified times of a validation loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Float32 times stay strictly inside (0, 1), where every objective has a finite target and weight.
_EPSILON = 1e-5


@dataclass(frozen=True)
class TimestepDensity:
    """uniform, or logit_normal: logit(t) ~ N(mean, std**2) (Esser et al. 2024, eq. 19); then shifted."""

    density: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    shift_base_pixels: int | None = None

    def __post_init__(self) -> None:
        if self.density not in ("uniform", "logit_normal"):
            raise ValueError(f"density must be uniform or logit_normal, got {self.density!r}")

    def times(self, uniform_B: Tensor, *, latent_pixels: int | None = None) -> Tensor:
        """Times in (0, 1), float32 [b], from uniform numbers in (0, 1) and the latent's h*w (for the shift)."""
        u = uniform_B.to(torch.float64)
        t = u if self.density == "uniform" else torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        t = shift_times(t, self.shift_for(latent_pixels))
        return t.clamp(_EPSILON, 1.0 - _EPSILON).float()

    def shift_for(self, latent_pixels: int | None) -> float:
        """The shift at a latent size of h*w pixels (any channel count)."""
        if self.shift_base_pixels is None:
            return self.shift
        if latent_pixels is None:
            raise ValueError("a shift that depends on the resolution needs latent_pixels (h*w)")
        return self.shift * resolution_shift(latent_pixels, self.shift_base_pixels)


def shift_times(t: Tensor, shift: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t), Esser et al. 2024, eq. 23; s > 1 moves times towards noise."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def resolution_shift(pixels: int, base_pixels: int) -> float:
    """sqrt(m / n): at m pixels it gives the uncertainty about the image that n pixels have unshifted (same place)."""
    return math.sqrt(pixels / base_pixels)
