"""What is learned, at which times, how it is sampled, and what can be asked for: solvers and conditions. No torch.

`samplers` does the arithmetic of the solvers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import Field, model_validator

from pipeline.config import StrictModel

ObjectiveKind = Literal["flow", "epsilon", "v"]
SamplerName = Literal["auto", "euler", "heun", "ddim", "dpmpp"]  # auto, or a key of SOLVERS
KINDS: tuple[str, ...] = get_args(ObjectiveKind)
NUM_TRAIN_STEPS = 1000  # of the discrete schedules of epsilon and v


@dataclass(frozen=True)
class Solver:
    """One way from noise to latents. evaluations_per_step: of the model, but for the last step, which has one."""

    name: str
    objectives: tuple[str, ...] = KINDS
    evaluations_per_step: int = 1

    def evaluations(self, steps: int) -> int:
        """How often a run of so many steps asks the model."""
        return self.evaluations_per_step * (steps - 1) + 1


SOLVERS = {
    solver.name: solver
    for solver in (
        Solver("euler", ("flow",)),
        Solver("heun", ("flow",), evaluations_per_step=2),
        Solver("ddim"),
        Solver("dpmpp"),
    )
}


def solver_for(sampler: str, objective: str) -> Solver:
    """The solver of a name for a kind of objective; auto is euler for flows, else dpmpp. ValueError for none."""
    if sampler == "auto":
        sampler = "euler" if objective == "flow" else "dpmpp"
    if sampler not in SOLVERS:
        raise ValueError(f"sampler must be one of {get_args(SamplerName)}, got {sampler!r}")
    solver = SOLVERS[sampler]
    if objective not in solver.objectives:
        fitting = " or ".join(s.name for s in SOLVERS.values() if objective in s.objectives)
        raise ValueError(
            f"{sampler} serves the objective {', '.join(solver.objectives)}; for {objective} use {fitting}"
        )
    return solver


class ObjectiveConfig(StrictModel):
    """What the model predicts and how its error is weighted over time."""

    kind: ObjectiveKind = Field(
        "flow", description="What the model predicts: flow (rectified flow velocity), epsilon (the noise), or v."
    )
    schedule: Literal["scaled_linear", "linear", "cosine"] = Field(
        "scaled_linear", description="Noise schedule of epsilon and v; flow has its own and ignores this."
    )
    beta_start: float = Field(0.00085, gt=0, lt=1, description="First beta of the linear schedules.")
    beta_end: float = Field(0.012, gt=0, lt=1, description="Last beta of the linear schedules.")
    weighting: Literal["none", "min_snr"] = Field(
        "none", description="Loss weight over time: none, or min_snr (the signal-to-noise ratio clamped at gamma)."
    )
    min_snr_gamma: float = Field(5.0, gt=0, description="Where min_snr clamps the signal-to-noise ratio.")

    zero_terminal_snr: bool = Field(
        False,
        description="Rescale the schedule of v to end, and sampling to begin, at pure noise (Lin et al. 2023).",
    )

    @model_validator(mode="after")
    def _fields_fit(self) -> ObjectiveConfig:
        if self.zero_terminal_snr and self.kind != "v":
            # At pure noise an error of epsilon says nothing of the data; a flow ends there by itself.
            raise ValueError(f"zero_terminal_snr needs kind v, not {self.kind}")
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start} must not exceed beta_end {self.beta_end}")
        return self


class TimestepConfig(StrictModel):
    """From which density training times are drawn."""

    density: Literal["uniform", "logit_normal"] = Field(
        "logit_normal",
        description="Density of training times: uniform, or logit_normal (more in the middle).",
    )
    mean: float = Field(0.0, description="Mean of logit(t) for logit_normal; above 0 favours noisier times.")
    std: float = Field(1.0, gt=0, description="Standard deviation of logit(t) for logit_normal.")
    shift: float = Field(
        1.0, gt=0, description="Constant shift towards noise, t' = s*t / (1 + (s-1)*t); 1 changes nothing."
    )
    shift_base_pixels: int | None = Field(
        None,
        gt=0,
        description="Latent pixels (h*w) at which the shift is as given; other sizes get it times sqrt(h*w / base). "
        "Empty: the same shift at every size.",
    )


class SamplerConfig(StrictModel):
    """How noise is turned into latents."""

    name: SamplerName = Field(
        "auto", description="Solver: euler, heun (flow only), ddim, dpmpp (any objective); auto: euler or dpmpp."
    )
    steps: int = Field(25, ge=1, le=1000, description="Solver steps; heun evaluates the model twice per step.")
    guidance: float = Field(
        1.0, ge=0, description="Classifier-free guidance scale; 1 is no guidance (one evaluation per step)."
    )
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="Guidance acts where low < t <= high (1 is pure noise; a low of 0 includes it)."
    )
    shift: float | None = Field(
        None, gt=0, description="Shift of the time grid towards noise; null: that of training. Flow objectives only."
    )

    @model_validator(mode="after")
    def _interval_in_order(self) -> SamplerConfig:
        low, high = self.guidance_interval
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"guidance_interval {low, high} must satisfy 0 <= low <= high <= 1")
        return self


# -- Conditions ------------------------------------------------------------------------------------------------

# What a sample was shown, or a request asks for: its class, its text, both or neither.
Combination = Literal["class+text", "class", "text", "none"]
COMBINATIONS: tuple[Combination, ...] = get_args(Combination)


def combination(*, labelled: bool, prompted: bool) -> Combination:
    """The combination of a row that has a label, a text that is not empty, or neither."""
    return "class+text" if labelled and prompted else "class" if labelled else "text" if prompted else "none"


def combination_shares(
    label_dropout: float | None, text_dropout: float | None, joint_dropout: float
) -> dict[Combination, float]:
    """The share of samples that each combination is trained on; a dropout is None where there is no such condition.

    Of two conditions both are dropped together from a share, and from the rest each by a draw of its own.
    """
    labels, texts = (1.0 if dropout is None else dropout for dropout in (label_dropout, text_dropout))
    joint = 0.0 if label_dropout is None or text_dropout is None else joint_dropout
    rest = 1.0 - joint
    return {
        "class+text": rest * (1.0 - labels) * (1.0 - texts),
        "class": rest * (1.0 - labels) * texts,
        "text": rest * labels * (1.0 - texts),
        "none": joint + rest * labels * texts,
    }
