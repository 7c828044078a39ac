"""Forward process, training targets, loss weights and conversions, for flows and for variance-preserving noise.

Time t is continuous in [0, 1]: t = 0 is data, t = 1 is noise. Everywhere x_t = alpha(t) x0 + sigma(t) noise.

flow     rectified flow: alpha = 1 - t, sigma = t, target u = noise - x0 (Liu et al. 2022, eq. 1, with time reversed;
         Esser et al. 2024, eq. 13). dx_t/dt = u.
epsilon  target = noise (Ho et al. 2020, eq. 14).
v        target = alpha noise - sigma x0 (Salimans and Ho 2022, section 4, appendix D).

epsilon and v use the 1000-step discrete schedules that published models were trained with, continued between
steps by linear interpolation of the log signal-to-noise ratio, so that t = k / 1000 is exactly discrete step k
(k = 0..999) and a diffusers model may be given 1000 t. Above 0.999 the last step's noise level holds: with
scaled_linear x_1 still carries alpha = 0.068 of the data, as in every model trained so (Lin et al. 2023). With
zero_terminal_snr, for v alone, the last step is pure noise (their algorithm 1) and alpha is what is interpolated.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.diffusion.solvers import KINDS, NUM_TRAIN_STEPS

SCHEDULES = ("scaled_linear", "linear", "cosine")
WEIGHTINGS = ("none", "min_snr")


@dataclass(frozen=True)
class Objective:
    """One choice of forward process, prediction target and loss weight: the fields of an ObjectiveConfig."""

    kind: str = "flow"
    schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    weighting: str = "none"
    min_snr_gamma: float = 5.0
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("kind", KINDS), ("schedule", SCHEDULES), ("weighting", WEIGHTINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"objective {name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.zero_terminal_snr and self.kind != "v":
            raise ValueError(f"zero_terminal_snr is for the objective v, got {self.kind!r}")

    # -- the forward process --

    def alpha_sigma(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Scale of data and of noise at each time, float32 [b] each."""
        t = t_B.to(torch.float64)
        if self.kind == "flow":
            return (1.0 - t).float(), t.float()
        log_snr = self._log_snr(t)
        return torch.sigmoid(log_snr).sqrt().float(), torch.sigmoid(-log_snr).sqrt().float()

    def snr(self, t_B: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha**2 / sigma**2, float32 [b]; infinite at t = 0 of a flow."""
        if self.kind == "flow":
            alpha, sigma = self.alpha_sigma(t_B)
            return (alpha / sigma).square()
        return self._log_snr(t_B.to(torch.float64)).exp().float()

    def noisy(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma noise."""
        alpha, sigma = self._at(t_B, x0_BCHW)
        return alpha * x0_BCHW + sigma * noise_BCHW

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """What the model should answer for `noisy(x0, noise, t)`."""
        if self.kind == "flow":
            return noise_BCHW - x0_BCHW
        if self.kind == "epsilon":
            return noise_BCHW
        alpha, sigma = self._at(t_B, x0_BCHW)
        return alpha * noise_BCHW - sigma * x0_BCHW

    def weight(self, t_B: Tensor) -> Tensor:
        """Loss weight of each row, float32 [b].

        min_snr is the weight min(SNR, gamma) on the error of x0 (Hang et al. 2023, section 3.4), carried over to
        the error this objective measures: divided by SNR for epsilon, by SNR + 1 for v, and times t**2 for flow
        (there x0 = x_t - t u, so an error of u is t times smaller in x0).
        """
        if self.weighting == "none":
            return torch.ones(t_B.shape, device=t_B.device)
        if self.kind == "flow":
            # min(SNR, gamma) t**2, written without the division by t.
            t = t_B.float()
            return torch.minimum((1.0 - t).square(), self.min_snr_gamma * t.square())
        snr = self.snr(t_B)
        clamped = snr.clamp(max=self.min_snr_gamma)
        return clamped / snr if self.kind == "epsilon" else clamped / (snr + 1.0)

    # -- conversions of a prediction --

    def denoised(self, pred_BCHW: Tensor, x_t_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The data x0 that a prediction implies at (x_t, t)."""
        alpha, sigma = self._at(t_B, x_t_BCHW)
        if self.kind == "flow":
            return x_t_BCHW - sigma * pred_BCHW
        if self.kind == "epsilon":
            return (x_t_BCHW - sigma * pred_BCHW) / alpha
        return alpha * x_t_BCHW - sigma * pred_BCHW

    def noise(self, pred_BCHW: Tensor, x_t_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The noise that a prediction implies at (x_t, t)."""
        alpha, sigma = self._at(t_B, x_t_BCHW)
        if self.kind == "flow":
            return x_t_BCHW + alpha * pred_BCHW
        if self.kind == "epsilon":
            return pred_BCHW
        return sigma * x_t_BCHW + alpha * pred_BCHW

    def velocity(self, pred_BCHW: Tensor, x_t_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """noise - x0, the rectified-flow velocity that a prediction implies at (x_t, t)."""
        if self.kind == "flow":
            return pred_BCHW
        return self.noise(pred_BCHW, x_t_BCHW, t_B) - self.denoised(pred_BCHW, x_t_BCHW, t_B)

    # -- inside --

    def _at(self, t_B: Tensor, like_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1,) + (1,) * (like_BCHW.ndim - 1)
        alpha, sigma = self.alpha_sigma(t_B)
        return alpha.reshape(shape).to(like_BCHW.dtype), sigma.reshape(shape).to(like_BCHW.dtype)

    def _log_snr(self, t: Tensor) -> Tensor:
        table = _table(self.schedule, self.beta_start, self.beta_end, self.zero_terminal_snr, t.device)
        position = (t * NUM_TRAIN_STEPS).clamp(0, NUM_TRAIN_STEPS - 1)
        below = position.floor().long().clamp(max=NUM_TRAIN_STEPS - 2)
        between = torch.lerp(table[below], table[below + 1], position - below)
        return torch.logit(between.square()) if self.zero_terminal_snr else between


def alphas_cumprod(schedule: str, beta_start: float, beta_end: float, zero_terminal_snr: bool = False) -> Tensor:
    """Products of (1 - beta) over 1000 steps, float64 [1000].

    scaled_linear: sqrt(beta) evenly spaced (the latent diffusion release; Rombach et al. 2022, appendix).
    linear: beta evenly spaced (Ho et al. 2020, section 4).
    cosine: Nichol and Dhariwal 2021, eq. 17, s = 0.008, beta clipped at 0.999.
    zero_terminal_snr: their roots shifted to end at 0 and scaled to begin as before (Lin et al. 2023, algorithm 1).
    """
    if schedule == "scaled_linear":
        roots = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), NUM_TRAIN_STEPS, dtype=torch.float64)
        betas = roots.square()
    elif schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, NUM_TRAIN_STEPS, dtype=torch.float64)
    else:
        f = torch.linspace(0, 1, NUM_TRAIN_STEPS + 1, dtype=torch.float64)
        f = ((f + 0.008) / 1.008 * math.pi / 2).cos().square()
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    products = (1 - betas).cumprod(0)
    if zero_terminal_snr:
        roots = products.sqrt()
        products = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))).square()
    return products


@functools.lru_cache(maxsize=8)
def _table(schedule: str, beta_start: float, beta_end: float, zero_snr: bool, device: torch.device) -> Tensor:
    """What is interpolated between steps: log-SNR, or alpha where the last log-SNR is infinite."""
    products = alphas_cumprod(schedule, beta_start, beta_end, zero_snr)
    return (products.sqrt() if zero_snr else torch.logit(products)).to(device)


# -- Densities of training times, as transforms of a uniform number: a time is keyed like any other draw ---------
#
# `TimestepDensity.times(u)` is the inverse of the density's distribution function: u from `rng.keyed_uniform` gives
# training times, u = (i + 1/2) / n gives the stratified times of a validation loss.


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
