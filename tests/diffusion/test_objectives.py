"""Each objective against its paper's equations and against diffusers' numbers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.diffusion.config import ObjectiveConfig
from pipeline.diffusion.objectives import NUM_TRAIN_STEPS, Objective, alphas_cumprod

KINDS = ["flow", "epsilon", "v"]
SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}


def ddim(schedule: str) -> DDIMScheduler:
    return DDIMScheduler(beta_schedule=SCHEDULES[schedule], beta_start=0.00085, beta_end=0.012, clip_sample=False)


def latents(seed: int, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, 3, 4, 5, generator=generator) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_levels_are_those_of_diffusers_at_every_step(schedule: str) -> None:
    theirs = ddim(schedule).alphas_cumprod.double()
    ours = alphas_cumprod(schedule, 0.00085, 0.012)
    assert torch.allclose(ours, theirs, rtol=2e-4, atol=1e-12)  # theirs is a float32 product of 1000 factors
    t = torch.arange(NUM_TRAIN_STEPS, dtype=torch.float32) / NUM_TRAIN_STEPS
    alpha, sigma = Objective("epsilon", schedule).alpha_sigma(t)
    assert torch.allclose(alpha.double().square(), ours, rtol=1e-6)
    assert torch.allclose(alpha.double() ** 2 + sigma.double() ** 2, torch.ones(1000, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr_is_lin_et_al_s_algorithm_1(schedule: str) -> None:
    theirs = rescale_zero_terminal_snr(ddim(schedule).betas.double())
    roots = alphas_cumprod(schedule, 0.00085, 0.012).sqrt()
    ours = alphas_cumprod(schedule, 0.00085, 0.012, zero_terminal_snr=True)
    assert torch.allclose(ours, (1 - theirs).cumprod(0), atol=1e-6)
    assert ours[0] == pytest.approx(float(roots[0] ** 2), rel=1e-12)
    assert ours[-1] == 0.0
    objective = Objective("v", schedule, zero_terminal_snr=True)
    alpha, sigma = objective.alpha_sigma(torch.arange(NUM_TRAIN_STEPS, dtype=torch.float64) / NUM_TRAIN_STEPS)
    assert torch.allclose(alpha.double().square(), ours, rtol=1e-5, atol=1e-12)
    assert (alpha[-1], sigma[-1]) == (0.0, 1.0)
    # Between steps, up to the very end, everything is finite and noise grows.
    fine = torch.linspace(0.99, 1.0, 101)
    assert (objective.snr(fine).diff() <= 0).all()
    assert objective.snr(fine)[-1] == 0.0
    x0, noise = latents(3, 101)
    for values in (objective.noisy(x0, noise, fine), objective.target(x0, noise, fine)):
        assert values.isfinite().all()
    weighted = Objective("v", schedule, weighting="min_snr", zero_terminal_snr=True)
    assert weighted.weight(fine).isfinite().all()


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_zero_terminal_snr_is_for_v_alone(kind: str) -> None:
    with pytest.raises(ValueError, match=f"zero_terminal_snr is for the objective v, got '{kind}'"):
        Objective(kind, zero_terminal_snr=True)
    with pytest.raises(ValueError, match=f"zero_terminal_snr needs kind v, not {kind}"):
        ObjectiveConfig(kind=kind, zero_terminal_snr=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_noisy_and_target_are_those_of_diffusers(kind: str, schedule: str) -> None:
    x0, noise = latents(0, 5)
    steps = torch.tensor([0, 7, 500, 998, 999])
    objective, scheduler = Objective(kind, schedule), ddim(schedule)
    t = steps / NUM_TRAIN_STEPS
    assert torch.allclose(objective.noisy(x0, noise, t), scheduler.add_noise(x0, noise, steps), atol=2e-4)
    expected = noise if kind == "epsilon" else scheduler.get_velocity(x0, noise, steps)
    assert torch.allclose(objective.target(x0, noise, t), expected, atol=2e-4)


def test_flow_is_the_straight_line_and_its_velocity() -> None:
    # Liu et al. 2022, eq. 1 with time reversed; Esser et al. 2024, eq. 13: z_t = (1 - t) x0 + t eps.
    x0, noise = latents(1)
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    objective = Objective("flow")
    expected = (1 - t).view(-1, 1, 1, 1) * x0 + t.view(-1, 1, 1, 1) * noise
    assert torch.equal(objective.noisy(x0, noise, t), expected)
    h = 2.0**-10
    slope = (
        objective.noisy(x0, noise, torch.full((4,), 0.5 + h)) - objective.noisy(x0, noise, torch.full((4,), 0.5))
    ) / h
    assert torch.allclose(objective.target(x0, noise, t), slope, atol=1e-3)
    scheduler = FlowMatchEulerDiscreteScheduler()
    theirs = scheduler.scale_noise(x0, scheduler.timesteps[[10, 200, 600, 999]], noise)
    assert torch.allclose(
        objective.noisy(x0, noise, scheduler.timesteps[[10, 200, 600, 999]] / 1000), theirs, atol=1e-6
    )


def test_v_is_the_paper_s_v() -> None:
    # Salimans and Ho 2022, section 4: v = alpha eps - sigma x, x = alpha z - sigma v, eps = sigma z + alpha v.
    x0, noise = latents(2)
    t = torch.tensor([0.1, 0.4, 0.7, 0.95])
    objective = Objective("v", "cosine")
    alpha, sigma = (w.view(-1, 1, 1, 1) for w in objective.alpha_sigma(t))
    z, v = objective.noisy(x0, noise, t), objective.target(x0, noise, t)
    assert torch.allclose(v, alpha * noise - sigma * x0)
    assert torch.allclose(alpha * z - sigma * v, x0, atol=1e-5)
    assert torch.allclose(sigma * z + alpha * v, noise, atol=1e-5)


@pytest.mark.integration
@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KINDS), st.sampled_from(list(SCHEDULES)), st.floats(0.01, 0.9), st.integers(0, 99))
def test_conversions_invert_the_forward_process(kind: str, schedule: str, time: float, seed: int) -> None:
    x0, noise = latents(seed)
    t = torch.full((4,), time)
    objective = Objective(kind, schedule)
    x_t, target = objective.noisy(x0, noise, t), objective.target(x0, noise, t)
    assert torch.allclose(objective.denoised(target, x_t, t), x0, atol=1e-3)
    assert torch.allclose(objective.noise(target, x_t, t), noise, atol=1e-3)
    assert torch.allclose(objective.velocity(target, x_t, t), noise - x0, atol=1e-3)


def test_noise_grows_continuously_between_the_discrete_steps() -> None:
    objective = Objective("epsilon")
    t = torch.linspace(0, 1, 7001)
    alpha, _ = objective.alpha_sigma(t)
    steps = alpha[1:] - alpha[:-1]
    assert (steps[:-7] < 0).all()
    assert steps.abs().max() < 1e-3
    assert alpha[-1] == pytest.approx(0.0682, abs=1e-4)  # terminal noise level of the latent diffusion release


def test_snr_matches_diffusers() -> None:
    steps = torch.tensor([0, 10, 400, 999])
    ours = Objective("epsilon").snr(steps / 1000)
    assert torch.allclose(ours, compute_snr(ddim("scaled_linear"), steps), rtol=1e-3)
    assert Objective("flow").snr(torch.tensor([0.25])).item() == pytest.approx(9.0)
    assert Objective("flow").snr(torch.tensor([0.0])).item() == math.inf


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_is_one_weight_on_the_error_of_x0_whatever_is_predicted(kind: str, schedule: str) -> None:
    # Hang et al. 2023: the loss is min(SNR, gamma) |x0 - x0_hat|**2.
    x0, noise = latents(3)
    t = torch.tensor([0.05, 0.3, 0.6, 0.9])
    objective = Objective(kind, schedule, weighting="min_snr", min_snr_gamma=5.0)
    x_t = objective.noisy(x0, noise, t)
    wrong = objective.target(x0, noise, t) + 0.1
    loss = (wrong - objective.target(x0, noise, t)).square().mean((1, 2, 3)) * objective.weight(t)
    x0_error = (objective.denoised(wrong, x_t, t) - x0).square().mean((1, 2, 3))
    assert torch.allclose(loss, objective.snr(t).clamp(max=5.0) * x0_error, rtol=1e-2)


def test_min_snr_weights_are_the_known_closed_forms() -> None:
    t = torch.tensor([0.002, 0.2, 0.5, 0.8])
    for kind, divisor in (("epsilon", 0.0), ("v", 1.0)):
        objective = Objective(kind, weighting="min_snr", min_snr_gamma=5.0)
        snr = objective.snr(t)
        assert torch.allclose(objective.weight(t), torch.minimum(snr, torch.tensor(5.0)) / (snr + divisor))
    flow = Objective("flow", weighting="min_snr", min_snr_gamma=5.0)
    assert flow.weight(torch.tensor([0.0, 0.1, 0.5, 1.0])).tolist() == pytest.approx([0.0, 0.05, 0.25, 0.0])
    assert Objective("flow").weight(t).tolist() == [1.0] * 4


def test_objectives_refuse_what_they_do_not_know() -> None:
    for arguments in ({"kind": "score"}, {"schedule": "sigmoid"}, {"weighting": "p2"}):
        with pytest.raises(ValueError, match=f"objective {next(iter(arguments))} must be one of"):
            Objective(**arguments)
