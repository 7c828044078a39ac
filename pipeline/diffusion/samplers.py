"""Solvers from noise to latents behind one call, with classifier-free guidance as one batched evaluation.

euler, heun   on the flow ODE dx/dt = u(x, t) over linspace(1, 0, N + 1), so that every step moves the sample (a
              scheduler that spaces N points over [1, 0.001] spends its last evaluation on a thousandth). heun is
              the trapezoidal rule of Karras et al. 2022, algorithm 1: 2N - 1 evaluations, the last step is euler's.
ddim          Song et al. 2021, eq. 12 with no added noise; on a flow it is the Euler step, term by term.
dpmpp         DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), algorithm 2, the last step of first order.

euler takes contrast away: of Gaussian data, with an exact model, 25 steps keep 0.93 to 0.95 of the spread, while
heun's keep all but 0.01 of it and dpmpp's all but 0.02. Where contrast counts, ask one of these two.

epsilon and v run on the discrete steps "trailing" from 999 (Lin et al. 2023, table 2), ending at clean data.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.diffusion.objectives import Objective, shift_times
from pipeline.diffusion.rng import ids_from_bytes, keyed_normal
from pipeline.diffusion.solvers import NUM_TRAIN_STEPS, solver_for

Conditioning = Mapping[str, Tensor | None]
StepCallback = Callable[[int, int, Tensor], None]  # step (1 when the first is done), steps, x_BCHW


class Predict(Protocol):
    """A model: noisy latents [b, c, h, w] and times [b] in [0, 1] to its prediction [b, c, h, w]."""

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, /, **conditioning: Tensor | None) -> Tensor: ...


@dataclass(frozen=True)
class Grid:
    """Times the model is asked at, and the noise levels there; `alpha`, `sigma` have one more entry, the end."""

    times: tuple[float, ...]  # N, decreasing, t = 1 is noise
    alpha: tuple[float, ...]  # N + 1, ends with 1
    sigma: tuple[float, ...]  # N + 1, ends with 0

    @property
    def steps(self) -> int:
        return len(self.times)


@torch.no_grad()
def sample(
    predict: Predict,
    noise_BCHW: Tensor,
    *,
    objective: Objective,
    sampler: str = "auto",
    steps: int = 25,
    cond: Conditioning | None = None,
    uncond: Conditioning | None = None,
    guidance: float | Tensor = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    shift: float = 1.0,
    callback: StepCallback | None = None,
) -> Tensor:
    """Latents in the model's normalised space, float32 [b, c, h, w], from standard normal noise of that shape.

    `cond` and `uncond` are the model's keyword arguments (labels_B, text_BLD, text_mask_BL), first dimension b.
    guidance: one number, or float [b], one per row; where it is not 1, `uncond` is needed and each evaluation is
    one call on 2b rows: uncond + g (cond - uncond) (Ho and Salimans 2022, eq. 6 with g = 1 + w), inside
    low < t <= high only (Kynkaanniemi et al. 2024), t = 0 belonging to an interval that begins there. A row's own
    g = 1 gives exactly its conditional prediction.
    `callback(step, steps, x)` is called after each step. ValueError on arguments that do not fit together.
    """
    solver = solver_for(sampler, objective.kind)
    grid = time_grid(objective, steps, shift=shift)
    guided = Guided(predict, cond or {}, uncond, guidance, guidance_interval)
    return _RUNS[solver.name](guided, noise_BCHW.float(), objective, grid, callback or _nothing)


def time_grid(objective: Objective, steps: int, *, shift: float = 1.0) -> Grid:
    """The N evaluation times of a solver run and the N + 1 noise levels it passes through."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if objective.kind == "flow":
        t = shift_times(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)
        return Grid(tuple(t[:-1].tolist()), tuple((1 - t).tolist()), tuple(t.tolist()))
    if shift != 1.0:
        raise ValueError(f"shift {shift} is for flow objectives; {objective.kind} uses the schedule's own steps")
    if steps > NUM_TRAIN_STEPS:
        raise ValueError(f"{objective.kind} has {NUM_TRAIN_STEPS} discrete steps, got steps={steps}")
    index = np.round(np.arange(NUM_TRAIN_STEPS, 0, -NUM_TRAIN_STEPS / steps))[:steps] - 1
    times = torch.from_numpy(index / NUM_TRAIN_STEPS)
    alpha, sigma = objective.alpha_sigma(times)
    return Grid(tuple(times.tolist()), (*alpha.tolist(), 1.0), (*sigma.tolist(), 0.0))


class Guided:
    """A model with its conditioning bound: (x, t) -> float32 prediction, guided where the interval says so."""

    def __init__(
        self,
        predict: Predict,
        cond: Conditioning,
        uncond: Conditioning | None,
        guidance: float | Tensor,
        interval: tuple[float, float],
    ) -> None:
        self.predict, self.cond, self.interval = predict, dict(cond), interval
        # Per-row scales always evaluate both halves, so that a row does not depend on its neighbours' scales.
        self.guides = isinstance(guidance, Tensor) or guidance != 1.0
        self.guidance = guidance
        if self.guides and uncond is None:
            raise ValueError(f"guidance {guidance} needs uncond, the arguments of the unconditional prediction")
        self.both = _stack(self.cond, uncond) if self.guides and uncond is not None else {}

    def __call__(self, x_BCHW: Tensor, t: float) -> Tensor:
        num_rows = x_BCHW.shape[0]
        low, high = self.interval
        inside = low < t <= high or t == low == 0.0  # discrete schedules of every step end at t = 0
        if not (self.guides and inside):
            return self.predict(x_BCHW, _times(t, num_rows, x_BCHW), **self.cond).float()
        twice = torch.cat([x_BCHW, x_BCHW])
        conditional, unconditional = (
            self.predict(twice, _times(t, 2 * num_rows, x_BCHW), **self.both).float().chunk(2)
        )
        scale = torch.as_tensor(self.guidance, dtype=torch.float32, device=x_BCHW.device).reshape(-1, 1, 1, 1)
        guided = unconditional + scale * (conditional - unconditional)
        return torch.where(scale == 1.0, conditional, guided)


def _euler(model: Guided, x: Tensor, objective: Objective, grid: Grid, callback: StepCallback) -> Tensor:
    for step, t in enumerate(grid.times):
        x = x + (grid.sigma[step + 1] - t) * model(x, t)
        callback(step + 1, grid.steps, x)
    return x


def _heun(model: Guided, x: Tensor, objective: Objective, grid: Grid, callback: StepCallback) -> Tensor:
    for step, t in enumerate(grid.times):
        t_next = grid.sigma[step + 1]
        slope = model(x, t)
        proposal = x + (t_next - t) * slope
        if step + 1 < grid.steps:
            proposal = x + (t_next - t) * 0.5 * (slope + model(proposal, t_next))
        x = proposal
        callback(step + 1, grid.steps, x)
    return x


def _ddim(model: Guided, x: Tensor, objective: Objective, grid: Grid, callback: StepCallback) -> Tensor:
    for step, t in enumerate(grid.times):
        pred, t_B = model(x, t), _times(t, x.shape[0], x)
        x0, noise = objective.denoised(pred, x, t_B), objective.noise(pred, x, t_B)
        x = grid.alpha[step + 1] * x0 + grid.sigma[step + 1] * noise
        callback(step + 1, grid.steps, x)
    return x


def _dpmpp(model: Guided, x: Tensor, objective: Objective, grid: Grid, callback: StepCallback) -> Tensor:
    half_log_snr = [_half_log_snr(a, s) for a, s in zip(grid.alpha, grid.sigma, strict=True)]
    previous: Tensor | None = None
    for step, t in enumerate(grid.times):
        x0 = objective.denoised(model(x, t), x, _times(t, x.shape[0], x))
        direction = x0
        if previous is not None and step + 1 < grid.steps:
            # r = h_last / h, so 1 / (2 r) = h / (2 h_last); a flow starts at infinite h_last, which gives 0.
            h = half_log_snr[step + 1] - half_log_snr[step]
            ratio = h / (half_log_snr[step] - half_log_snr[step - 1])
            direction = x0 + 0.5 * ratio * (x0 - previous)
        alpha, sigma = grid.alpha[step], grid.sigma[step]
        alpha_next, sigma_next = grid.alpha[step + 1], grid.sigma[step + 1]
        # sigma'/sigma x - alpha' (exp(-h) - 1) D, with exp(-h) = (alpha sigma') / (alpha' sigma) multiplied out.
        x = (sigma_next / sigma) * x + (alpha_next - alpha * sigma_next / sigma) * direction
        previous = x0
        callback(step + 1, grid.steps, x)
    return x


_RUNS: dict[str, Callable[[Guided, Tensor, Objective, Grid, StepCallback], Tensor]] = {
    "euler": _euler,
    "heun": _heun,
    "ddim": _ddim,
    "dpmpp": _dpmpp,
}


def _half_log_snr(alpha: float, sigma: float) -> float:
    if alpha == 0.0:
        return -math.inf
    return math.inf if sigma == 0.0 else math.log(alpha) - math.log(sigma)


def _stack(cond: Conditioning, uncond: Conditioning) -> dict[str, Tensor | None]:
    if set(cond) != set(uncond):
        raise ValueError(f"cond and uncond must have the same keys, got {sorted(cond)} and {sorted(uncond)}")
    both: dict[str, Tensor | None] = {}
    for name, value in cond.items():
        other = uncond[name]
        if value is None and other is None:
            both[name] = None
        elif value is None or other is None or value.shape != other.shape:
            raise ValueError(f"cond and uncond disagree about the shape of {name}: pad both to one length")
        else:
            both[name] = torch.cat([value, other])
    return both


def _times(t: float, num_rows: int, like: Tensor) -> Tensor:
    return torch.full((num_rows,), t, dtype=torch.float32, device=like.device)


def _nothing(step: int, steps: int, x_BCHW: Tensor) -> None:
    return None


# -- Batches of latents out of a trained model, drawn alike by the sample job, while training and in a notebook ----
#
# Noise is keyed by an id and a purpose and comes from the CPU, batches have one size, the last one padded: on a CPU a
# latent is bit for bit the same whatever is drawn beside it.


@dataclass(frozen=True)
class Embedding:
    """One prompt: states float32 [l, d]; which of them count, bool [l] (None: all); pooled float32 [p] or None."""

    text_LD: npt.NDArray[np.float32]
    mask_L: npt.NDArray[np.bool_] | None
    pooled_P: npt.NDArray[np.float32] | None

    @property
    def size_bytes(self) -> int:
        """Its size in a cache."""
        return self.text_LD.nbytes + (0 if self.pooled_P is None else self.pooled_P.nbytes)


Texts = Sequence[tuple[Embedding, Embedding]]  # of each row: its prompt, and what guidance leads away from


@dataclass(frozen=True)
class Solving:
    """How noise becomes latents: the arguments of `sample` of these names."""

    sampler: str = "auto"
    steps: int = 25
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    shift: float = 1.0


@dataclass(frozen=True)
class Drawer:
    """A model that draws. mean, std: float32 [c], of raw latents; num_classes: None for a model without classes.

    seed, purpose: key the noise with each row's id; dtype: float32, or what autocast computes in. factor: image
    pixels per latent pixel, given where the model reads sizes. distilled: guidance is one of its inputs.
    """

    predict: Predict
    objective: Objective
    mean_C: Tensor
    std_C: Tensor
    num_classes: int | None
    seed: int
    purpose: str
    device: torch.device
    dtype: torch.dtype
    factor: int | None = None
    distilled: bool = False

    @torch.no_grad()
    def __call__(
        self,
        ids: Sequence[bytes],
        labels: Sequence[int | None],
        texts: Texts | None,
        shape: tuple[int, int, int],
        solving: Solving,
    ) -> Tensor:
        """Raw latents, float32 [n, *shape] on the device, of n rows in one batch; ids of 16 bytes."""
        noise = keyed_normal(self.seed, ids_from_bytes(ids), purpose=self.purpose, shape=shape)
        cond, uncond = self._conditioning(labels, texts)
        if self.factor is not None:
            # The whole of an original of the target's very size.
            height, width = (side * self.factor for side in shape[1:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]], device=self.device).repeat(len(ids), 1)
            cond["sizes_B6"] = uncond["sizes_B6"] = sizes
        if self.distilled:
            cond["guidance_B"] = torch.full((len(ids),), solving.guidance, device=self.device)
            solving = replace(solving, guidance=1.0)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            normalised = sample(
                self.predict,
                noise.to(self.device),
                objective=self.objective,
                cond=cond,
                uncond=uncond,
                **vars(solving),
            )
        mean, std = (value.to(self.device).reshape(1, -1, 1, 1) for value in (self.mean_C, self.std_C))
        return normalised.float() * std + mean

    def _conditioning(
        self, labels: Sequence[int | None], texts: Texts | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        cond: dict[str, Tensor] = {}
        uncond: dict[str, Tensor] = {}
        if self.num_classes is not None:
            rows = [self.num_classes if label is None else label for label in labels]
            cond["labels_B"] = torch.tensor(rows, dtype=torch.int64, device=self.device)
            uncond["labels_B"] = torch.full_like(cond["labels_B"], self.num_classes)
        if texts is not None:
            cond |= self._text_arguments([prompt for prompt, _ in texts])
            uncond |= self._text_arguments([away for _, away in texts])
        return cond, uncond

    def _text_arguments(self, rows: Sequence[Embedding]) -> dict[str, Tensor]:
        parts: dict[str, list[np.ndarray | None]] = {
            "text_BLD": [row.text_LD for row in rows],
            "text_mask_BL": [row.mask_L for row in rows],
            "pooled_BP": [row.pooled_P for row in rows],
        }
        return {
            name: torch.from_numpy(np.stack([array for array in arrays if array is not None])).to(self.device)
            for name, arrays in parts.items()
            if arrays[0] is not None
        }


def padded(indices: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of exactly `batch_size` indices and how many of them are real; the last is filled with its first.

    A fixed batch size keeps every kernel's shape, and so every bit of a row, apart from what else is drawn.
    """
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        filler = np.full(batch_size - len(part), part[0], dtype=part.dtype)
        yield np.concatenate([part, filler]), len(part)


# -- A model made faster ---------------------------------------------------------------------------------------


def compile_for_shapes(module: nn.Module, num_shapes: int) -> None:
    """Compile a module in place, anew for each of up to `num_shapes` input shapes; torch's own limit is eight."""
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # from 2.13 on
        module.compile(dynamic=False, recompile_limit=num_shapes)
        return
    # Before, the limit was that of the process.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, num_shapes)
    module.compile(dynamic=False)
