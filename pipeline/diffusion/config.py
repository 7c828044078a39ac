"""What is learned, at which times, and how it is sampled: configuration of the diffusion mathematics."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config import StrictModel
from pipeline.diffusion.solvers import ObjectiveKind, SamplerName


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
