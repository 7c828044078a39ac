"""Timestep densities against their formulas and against diffusers' sampling of the same density."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from pipeline.diffusion.objectives import TimestepDensity, resolution_shift, shift_times

STRATA = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000


def test_uniform_is_the_uniform_number_itself() -> None:
    u = torch.tensor([0.1, 0.5, 0.9])
    assert torch.equal(TimestepDensity("uniform").times(u), u)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7), (1.0, 1.4)])
def test_logit_normal_has_the_paper_s_density(mean: float, std: float) -> None:
    # Esser et al. 2024, eq. 19: pi(t) = 1 / (s sqrt(2 pi)) 1 / (t (1 - t)) exp(-(logit(t) - m)**2 / (2 s**2)).
    t = TimestepDensity("logit_normal", mean, std).times(STRATA).double()
    for centre in (0.2, 0.5, 0.8):
        measured = ((t > centre - 0.02) & (t < centre + 0.02)).double().mean() / 0.04
        x = torch.linspace(centre - 0.02, centre + 0.02, 101, dtype=torch.float64)
        pi = torch.exp(-((torch.logit(x) - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi) * x * (1 - x))
        assert measured == pytest.approx(pi.mean().item(), rel=0.02)


def test_logit_normal_agrees_with_diffusers() -> None:
    torch.manual_seed(0)
    theirs = compute_density_for_timestep_sampling("logit_normal", 50_000, 0.3, 0.8).double().sort().values
    ours = TimestepDensity("logit_normal", 0.3, 0.8).times(STRATA).double()
    for q in (0.05, 0.5, 0.95):
        assert torch.quantile(ours, q).item() == pytest.approx(torch.quantile(theirs, q).item(), abs=0.01)


def test_shift_is_that_of_the_sd3_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain = torch.arange(1000, 0, -1) / 1000
    assert torch.allclose(shift_times(plain, 3.0), scheduler.sigmas, atol=1e-6)
    assert torch.equal(shift_times(plain, 1.0), plain)


def test_resolution_shift_keeps_the_signal_to_noise_of_the_averaged_image() -> None:
    # Esser et al. 2024, eq. 23: a constant image seen through n pixels has standard error t / (1 - t) / sqrt(n).
    t_n = torch.tensor([0.1, 0.5, 0.9])
    t_m = shift_times(t_n, resolution_shift(64 * 64, 32 * 32))
    assert torch.allclose(t_m / (1 - t_m) / 64, t_n / (1 - t_n) / 32)


def test_shift_follows_the_latent_size() -> None:
    density = TimestepDensity("uniform", shift=1.5, shift_base_pixels=1024)
    u = torch.tensor([0.3])
    assert density.shift_for(1024) == 1.5
    assert density.shift_for(4096) == 3.0
    assert torch.allclose(density.times(u, latent_pixels=4096), shift_times(u, 3.0))
    with pytest.raises(ValueError, match="needs latent_pixels"):
        density.times(u)


def test_times_stay_inside_the_open_interval() -> None:
    extremes = torch.tensor([2.0**-24, 1 - 2.0**-24])
    for density in (TimestepDensity("uniform"), TimestepDensity("logit_normal", 5.0, 3.0, shift=9.0)):
        t = density.times(extremes)
        assert (t > 0).all()
        assert (t < 1).all()
        assert t.dtype == torch.float32


def test_an_unknown_density_is_refused() -> None:
    with pytest.raises(ValueError, match="density must be uniform or logit_normal, got 'mode'"):
        TimestepDensity("mode")
