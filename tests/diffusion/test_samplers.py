"""Solvers against exact solutions, against each other, and step for step against diffusers' schedulers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from pipeline.diffusion.config import ObjectiveConfig
from pipeline.diffusion.objectives import Objective
from pipeline.diffusion.samplers import sample, time_grid
from pipeline.diffusion.solvers import SOLVERS
from pipeline.train.pipelines import scheduler_config

SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
NOISE = torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(0))


def a_model(x: Tensor, t: Tensor, **cond: Tensor | None) -> Tensor:
    """Any smooth function of (x, t, label): both sides of a comparison use it."""
    labels = cond.get("labels_B")
    offset = 0.0 if labels is None else 0.1 * labels.view(-1, 1, 1, 1).float()
    return torch.tanh(0.7 * x + t.view(-1, 1, 1, 1) + offset) + 0.2 * x


def gaussian_model(objective: Objective, mean: float, std: float):  # type: ignore[no-untyped-def]
    """The exact prediction when data is N(mean, std**2), by conditional expectation."""

    def predict(x: Tensor, t: Tensor, **_: Tensor | None) -> Tensor:
        alpha, sigma = (w.view(-1, 1, 1, 1).double() for w in objective.alpha_sigma(t))
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        x0 = mean + gain * (x.double() - alpha * mean)
        noise = (x.double() - alpha * x0) / sigma
        return objective.target(x0, noise, t)

    return predict


def gaussian_answer(objective: Objective, mean: float, std: float, grid_start: float) -> Tensor:
    """The probability-flow ODE maps quantile to quantile: x0 = mean + std (x1 - alpha mean) / std(x1)."""
    alpha, sigma = objective.alpha_sigma(torch.tensor([grid_start]))
    spread = (alpha**2 * std**2 + sigma**2).sqrt()
    return mean + std * (NOISE - alpha * mean) / spread


@pytest.mark.parametrize("steps", [1, 2, 7, 25])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_the_flow_match_scheduler_given_our_sigmas(steps: int, shift: float) -> None:
    grid = time_grid(Objective("flow"), steps, shift=shift)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=list(grid.times))
    x = NOISE
    for timestep in scheduler.timesteps:
        x = scheduler.step(a_model(x, (timestep / 1000).expand(3)), timestep, x).prev_sample
    ours = sample(a_model, NOISE, objective=Objective("flow"), sampler="euler", steps=steps, shift=shift)
    assert torch.allclose(ours, x, atol=1e-5)


def test_flow_grid_runs_from_pure_noise_to_data_in_even_steps() -> None:
    grid = time_grid(Objective("flow"), 4)
    assert grid.times == (1.0, 0.75, 0.5, 0.25)
    assert grid.sigma == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert grid.alpha == (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.mark.parametrize(
    ("kind", "prediction_type", "schedule"),
    # Not epsilon with cosine: alpha is 5e-5 at step 999 and float32 keeps no digit of the division by it.
    [
        ("epsilon", "epsilon", "scaled_linear"),
        ("v", "v_prediction", "scaled_linear"),
        ("v", "v_prediction", "cosine"),
    ],
)
@pytest.mark.parametrize("steps", [5, 20])
def test_ddim_is_diffusers_ddim(kind: str, prediction_type: str, schedule: str, steps: int) -> None:
    scheduler = DDIMScheduler(
        beta_schedule=SCHEDULES[schedule],
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    x = NOISE
    for timestep in scheduler.timesteps:
        x = scheduler.step(a_model(x, (timestep / 1000).expand(3)), timestep, x).prev_sample
    ours = sample(a_model, NOISE, objective=Objective(kind, schedule), sampler="ddim", steps=steps)
    assert torch.allclose(ours, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_with_zero_terminal_snr_the_exported_scheduler_draws_the_same(schedule: str) -> None:
    config = ObjectiveConfig(kind="v", schedule=schedule, zero_terminal_snr=True)
    exported = scheduler_config(config, 1.0)
    assert exported["rescale_betas_zero_snr"] is True
    assert "rescale_betas_zero_snr" not in scheduler_config(ObjectiveConfig(kind="v"), 1.0)
    scheduler = DDIMScheduler.from_config(exported)
    scheduler.set_timesteps(10)
    x = NOISE
    for timestep in scheduler.timesteps:
        x = scheduler.step(a_model(x, (timestep / 1000).expand(3)), timestep, x).prev_sample
    objective = Objective(**config.model_dump())
    assert torch.allclose(sample(a_model, NOISE, objective=objective, sampler="ddim", steps=10), x, atol=1e-3)
    for steps in (1, 10, 1000):
        assert time_grid(objective, steps).alpha[0] == 0.0
        assert time_grid(objective, steps).sigma[0] == 1.0


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp"])
def test_with_zero_terminal_snr_pure_noise_becomes_the_mean_of_the_data(sampler: str) -> None:
    """What Lin et al. 2023 repair: a start that tells nothing of the data ends at all its brightness."""
    far = 5.0
    for zero_terminal_snr, right in ((True, True), (False, False)):
        objective = Objective("v", zero_terminal_snr=zero_terminal_snr)
        drawn = sample(gaussian_model(objective, far, 0.5), NOISE, objective=objective, sampler=sampler, steps=200)
        expected = far + 0.5 * NOISE
        assert torch.allclose(drawn.float(), expected, atol=0.06) is right


@pytest.mark.parametrize(("kind", "prediction_type"), [("epsilon", "epsilon"), ("v", "v_prediction")])
@pytest.mark.parametrize("steps", [5, 16, 20])
def test_dpmpp_is_diffusers_dpmsolver_multistep(kind: str, prediction_type: str, steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(steps)
    x = NOISE
    for timestep in scheduler.timesteps:
        x = scheduler.step(a_model(x, (timestep / 1000).expand(3)), timestep, x).prev_sample
    ours = sample(a_model, NOISE, objective=Objective(kind), sampler="dpmpp", steps=steps)
    assert torch.allclose(ours, x, rtol=1e-3, atol=1e-3)


def test_ddim_on_a_flow_is_euler() -> None:
    flow = Objective("flow")
    euler = sample(a_model, NOISE, objective=flow, sampler="euler", steps=9)
    assert torch.allclose(sample(a_model, NOISE, objective=flow, sampler="ddim", steps=9), euler, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "sampler", "low", "high"),
    # Error at 100 steps over error at 50: a half for order 1, a quarter for order 2. dpmpp ends on an order-1 step.
    [
        ("flow", "euler", 0.48, 0.52),
        ("flow", "heun", 0.22, 0.28),
        ("flow", "dpmpp", 0.2, 0.4),
        ("v", "ddim", 0.45, 0.6),
        ("epsilon", "ddim", 0.45, 0.6),
    ],
)
def test_solvers_converge_to_the_exact_answer_with_their_order(
    kind: str, sampler: str, low: float, high: float
) -> None:
    objective = Objective(kind)
    predict = gaussian_model(objective, 0.8, 0.4)
    answer = gaussian_answer(objective, 0.8, 0.4, 1.0 if kind == "flow" else 0.999)
    errors = [
        (sample(predict, NOISE, objective=objective, sampler=sampler, steps=n) - answer).abs().max().item()
        for n in (50, 100)
    ]
    assert errors[1] < 0.07
    assert low < errors[1] / errors[0] < high


@pytest.mark.parametrize("kind", ["flow", "v", "epsilon"])
def test_dpmpp_beats_ddim_at_equal_cost(kind: str) -> None:
    objective = Objective(kind)
    predict = gaussian_model(objective, 0.8, 1.0)
    answer = gaussian_answer(objective, 0.8, 1.0, 1.0 if kind == "flow" else 0.999)
    error = {
        name: (sample(predict, NOISE, objective=objective, sampler=name, steps=20) - answer).abs().max()
        for name in ("ddim", "dpmpp")
    }
    assert error["dpmpp"] < 0.35 * error["ddim"]


@pytest.mark.parametrize("std", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(
    ("sampler", "least", "most"), [("euler", 0.92, 0.96), ("heun", 0.99, 1.0), ("dpmpp", 0.98, 1.02)]
)
def test_solvers_of_second_order_keep_the_spread_of_the_data(
    sampler: str, least: float, most: float, std: float
) -> None:
    objective = Objective("flow")
    drawn = sample(gaussian_model(objective, 0.0, std), NOISE, objective=objective, sampler=sampler, steps=25)
    assert least < (drawn.std() / (std * NOISE.std())).item() < most


def test_evaluation_counts() -> None:
    for sampler, expected in (("euler", 8), ("heun", 15), ("ddim", 8), ("dpmpp", 8)):
        calls: list[float] = []

        def counted(x: Tensor, t: Tensor, calls: list[float] = calls, **_: Tensor | None) -> Tensor:
            calls.append(t[0].item())
            return torch.zeros_like(x)

        sample(counted, NOISE, objective=Objective("flow"), sampler=sampler, steps=8)
        assert len(calls) == SOLVERS[sampler].evaluations(8) == expected
        assert 0.0 < min(calls) <= max(calls) == 1.0


def guided(guidance: float | Tensor, **extra: object) -> tuple[Tensor, list[int]]:
    sizes: list[int] = []

    def counted(x: Tensor, t: Tensor, **cond: Tensor | None) -> Tensor:
        sizes.append(x.shape[0])
        return a_model(x, t, **cond)

    labels = torch.tensor([0, 3, 5])
    arguments: dict[str, object] = {"uncond": {"labels_B": torch.full((3,), 9)}} | extra
    result = sample(
        counted,
        NOISE,
        objective=Objective("flow"),
        steps=4,
        cond={"labels_B": labels},
        guidance=guidance,
        **arguments,  # type: ignore[arg-type]
    )
    return result, sizes


def test_guidance_is_one_batched_call_of_the_paper_s_mixture() -> None:
    # Ho and Salimans 2022, eq. 6 with w = g - 1: (1 + w) cond - w uncond.
    g = 3.0

    def by_hand(x: Tensor, t: Tensor, **_: Tensor | None) -> Tensor:
        conditional = a_model(x, t, labels_B=torch.tensor([0, 3, 5]))
        unconditional = a_model(x, t, labels_B=torch.full((3,), 9))
        return g * conditional - (g - 1) * unconditional

    result, sizes = guided(g)
    assert sizes == [6, 6, 6, 6]
    assert torch.allclose(result, sample(by_hand, NOISE, objective=Objective("flow"), steps=4), atol=1e-5)


def test_guidance_one_asks_only_the_conditional_model() -> None:
    result, sizes = guided(1.0, uncond=None)
    assert sizes == [3, 3, 3, 3]
    per_row, sizes = guided(torch.tensor([1.0, 2.0, 1.0]))
    assert sizes == [6, 6, 6, 6]
    assert torch.equal(per_row[[0, 2]], result[[0, 2]])
    assert torch.equal(per_row[1], guided(2.0)[0][1])


def test_guidance_interval_is_open_below_and_closed_above() -> None:
    _, sizes = guided(2.0, guidance_interval=(0.25, 0.75))  # times are 1, 0.75, 0.5, 0.25
    assert sizes == [3, 6, 6, 3]
    assert torch.equal(guided(2.0, guidance_interval=(0.0, 0.0))[0], guided(1.0)[0])


@pytest.mark.integration
def test_an_interval_that_begins_at_zero_holds_the_last_time() -> None:
    assert time_grid(Objective("v"), 1000).times[-1] == 0.0
    for low, rows in ((0.0, 6), (0.001, 3)):
        seen: list[tuple[float, int]] = []

        def predict(x: Tensor, t: Tensor, seen: list[tuple[float, int]] = seen, **_: Tensor | None) -> Tensor:
            seen.append((float(t[0]), len(x)))
            return torch.zeros_like(x)

        cond: dict[str, Tensor | None] = {"labels_B": torch.tensor([0, 1, 2])}
        how: Any = {"guidance": 2.0, "guidance_interval": (low, 1.0), "cond": cond, "uncond": cond}
        sample(predict, NOISE, objective=Objective("v"), sampler="ddim", steps=1000, **how)
        assert seen[-1] == (0.0, rows)


def test_heun_asks_twice_a_step_but_for_the_last() -> None:
    calls: list[float] = []

    def predict(x: Tensor, t: Tensor, **_: Tensor | None) -> Tensor:
        calls.append(float(t[0]))
        return torch.zeros_like(x)

    for steps in (1, 2, 5):
        calls.clear()
        sample(predict, NOISE, objective=Objective("flow"), sampler="heun", steps=steps)
        assert len(calls) == 2 * steps - 1


def test_text_and_masks_are_stacked_too() -> None:
    seen: list[tuple[int, ...]] = []

    def predict(x: Tensor, t: Tensor, **cond: Tensor | None) -> Tensor:
        text, mask = cond["text_BLD"], cond["text_mask_BL"]
        assert text is not None
        assert cond["labels_B"] is None
        seen.append((*text.shape, *(mask.shape if mask is not None else ())))
        return torch.zeros_like(x)

    text = {"labels_B": None, "text_BLD": torch.ones(3, 5, 7), "text_mask_BL": torch.ones(3, 5, dtype=torch.bool)}
    sample(predict, NOISE, objective=Objective("flow"), steps=1, cond=text, uncond=text, guidance=2.0)
    assert seen == [(6, 5, 7, 6, 5)]


def test_callback_sees_every_step() -> None:
    seen: list[tuple[int, int]] = []
    for kind, sampler in (("flow", "euler"), ("flow", "heun"), ("v", "ddim"), ("v", "dpmpp")):
        last: list[Tensor] = []

        def note(step: int, steps: int, x: Tensor, last: list[Tensor] = last) -> None:
            seen.append((step, steps))
            last.append(x)

        result = sample(a_model, NOISE, objective=Objective(kind), sampler=sampler, steps=3, callback=note)
        assert torch.equal(last[-1], result)
    assert seen == [(1, 3), (2, 3), (3, 3)] * 4


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    whole = sample(a_model, NOISE, objective=Objective("flow"), sampler="heun", steps=6)
    alone = sample(a_model, NOISE[1:2], objective=Objective("flow"), sampler="heun", steps=6)
    assert torch.allclose(whole[1:2], alone, atol=1e-6)


def test_auto_takes_euler_for_flows_and_dpmpp_otherwise() -> None:
    for kind, sampler in (("flow", "euler"), ("v", "dpmpp")):
        auto = sample(a_model, NOISE, objective=Objective(kind), steps=3)
        assert torch.equal(auto, sample(a_model, NOISE, objective=Objective(kind), sampler=sampler, steps=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "ode45"}, "sampler must be one of"),
        (
            {"sampler": "euler", "objective": Objective("v")},
            "euler serves the objective flow; for v use ddim or dpmpp",
        ),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1001, "objective": Objective("v")}, "v has 1000 discrete steps, got steps=1001"),
        ({"shift": 2.0, "objective": Objective("epsilon")}, "shift 2.0 is for flow objectives"),
        ({"guidance": 2.0}, "guidance 2.0 needs uncond"),
        ({"guidance": 2.0, "cond": {"labels_B": NOISE}, "uncond": {}}, "must have the same keys"),
        ({"guidance": 2.0, "cond": {"text_BLD": NOISE}, "uncond": {"text_BLD": NOISE[:1]}}, "shape of text_BLD"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(a_model, NOISE, **({"objective": Objective("flow")} | arguments))  # type: ignore[arg-type]


def test_half_log_snr_at_the_ends() -> None:
    from pipeline.diffusion.samplers import _half_log_snr

    assert _half_log_snr(0.0, 1.0) == -math.inf
    assert _half_log_snr(1.0, 0.0) == math.inf
