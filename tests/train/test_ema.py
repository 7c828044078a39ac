"""Averages of the weights against their definitions, and lengths rebuilt after the run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.train.state import Ema, Track, combine, gamma_of, reconstruction, sigma_of, swapped


@given(st.floats(0.01, 0.28))
def test_gamma_and_relative_width_are_inverse(sigma_rel: float) -> None:
    assert sigma_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-6)


def test_gamma_of_the_published_widths() -> None:
    # Karras et al. 2024: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94.
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.01)


@pytest.mark.parametrize("sigma_rel", [0.0, 0.29, -1.0])
def test_a_width_without_a_profile_is_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        gamma_of(sigma_rel)


def test_a_track_is_of_exactly_one_kind() -> None:
    with pytest.raises(ValueError, match="exactly one of sigma_rel and half_life_images"):
        Track("x")
    with pytest.raises(ValueError, match="exactly one of sigma_rel and half_life_images"):
        Track("x", sigma_rel=0.1, half_life_images=1.0)


def test_two_tracks_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="share a name"):
        Ema([Track("x", 0.1), Track("x", 0.05)], {})


def _walk(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(steps, 6, generator=generator).cumsum(0) / 10)


def test_the_power_track_is_the_weighted_mean_of_its_profile() -> None:
    steps, batch, sigma_rel = 400, 8, 0.1
    weights = _walk(steps)
    param = torch.zeros(6)
    ema = Ema([Track("p", sigma_rel)], {"w": param})
    for i, value in enumerate(weights, 1):
        ema.update({"w": value}, i * batch, batch)
    t = np.arange(1, steps + 1)
    profile = t ** gamma_of(sigma_rel)
    wanted = sum(float(p) * w.double() for p, w in zip(profile / profile.sum(), weights, strict=True))
    torch.testing.assert_close(ema.averages["p"]["w"].double(), wanted, rtol=0, atol=5e-3)


def test_the_first_step_forgets_the_initial_weights_in_a_power_track() -> None:
    ema = Ema([Track("p", 0.05)], {"w": torch.full((3,), 99.0)})
    ema.update({"w": torch.ones(3)}, images=8, batch=8)
    assert torch.equal(ema.averages["p"]["w"], torch.ones(3))


def test_the_half_life_track_halves_a_step_in_its_half_life() -> None:
    ema = Ema([Track("h", half_life_images=64.0)], {"w": torch.ones(1)})
    for _ in range(8):  # far into the run, where the half-life is not shortened any more
        ema.update({"w": torch.zeros(1)}, images=10**9, batch=8)
    assert float(ema.averages["h"]["w"]) == pytest.approx(0.5, rel=1e-5)


def test_a_parameter_holds_the_average_inside_the_block_only() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    ema = Ema([Track("h", half_life_images=1e9)], {"w": param})
    ema.averages["h"]["w"].fill_(5.0)
    with pytest.raises(RuntimeError, match="inside"), swapped({"w": param}, ema.averages["h"]):
        assert torch.equal(param, torch.full((2,), 5.0))
        raise RuntimeError("inside")
    assert torch.equal(param, torch.ones(2))


def test_any_length_is_rebuilt_from_snapshots_of_two_tracks() -> None:
    steps, batch, wanted = 1000, 8, 0.075
    weights = _walk(steps)
    ema = Ema([Track("a", 0.05), Track("b", 0.10), Track("truth", wanted)], {"w": torch.zeros(6)})
    snapshots, where = [], []
    for i, value in enumerate(weights, 1):
        ema.update({"w": value}, i * batch, batch)
        if i % 125 == 0:
            for name, sigma in (("a", 0.05), ("b", 0.10)):
                snapshots.append({"w": ema.averages[name]["w"].clone()})
                where.append((sigma, i * batch))
    mix = reconstruction(where, wanted, steps * batch)
    rebuilt = combine(snapshots, mix)["w"]
    truth = ema.averages["truth"]["w"]
    assert float((rebuilt - truth).norm() / truth.norm()) < 0.01
    assert rebuilt.dtype == torch.float32


def test_a_stored_length_is_rebuilt_from_itself() -> None:
    mix = reconstruction([(0.05, 100), (0.10, 100), (0.05, 200), (0.10, 200)], 0.10, 200)
    np.testing.assert_allclose(mix, [0, 0, 0, 1], atol=1e-6)


def test_snapshots_of_the_future_are_refused() -> None:
    with pytest.raises(ValueError, match="at or before"):
        reconstruction([(0.05, 300)], 0.10, 200)
