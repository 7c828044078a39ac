"""Configuration of a codec in use and of the job that fits one. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config import StrictModel
from pipeline.source.config import ImageConfig, SourceConfig
from pipeline.tracking.config import TrackingConfig


class CodecConfig(StrictModel):
    """Which codec turns images into latents, and in which arithmetic."""

    path: str = Field(
        ...,
        min_length=1,
        description="Directory in diffusers layout (a VAE, or a pipeline with one in vae/), fsspec URI, or hub id.",
    )
    revision: str | None = Field(
        None, description="Commit or tag that pins a hub id; required for one, without meaning for a directory."
    )
    kind: str = Field("auto", description="auto reads config.json (diffusers); else the name of a codec plug-in.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Arithmetic of the codec, one for all rows of a dataset; auto is what the dataset records, for a "
        "new one bfloat16 where encoders run on GPUs of any kind (before Ampere float16 is faster), else float32.",
    )
    posterior: Literal["mode", "sample", "moments"] = Field(
        "mode",
        description="What is stored of the posterior: mode, one draw seeded by sample id, or mean and log-variance.",
    )
    compile: bool = Field(False, description="torch.compile the codec: slow start, faster on a GPU.")
    channels_last: bool = Field(True, description="Weights and activations in channels-last memory order.")


class FitConfig(StrictModel):
    """Shape and recipe of a small AutoencoderKL. The defaults suit 32x32 images on two CPU cores."""

    images: int = Field(
        4096, ge=1, description="At most this many images are fitted on, chosen by hash of their key."
    )
    holdout: int = Field(128, ge=1, description="Images kept aside to measure the final PSNR.")
    block_out_channels: tuple[int, ...] = Field(
        (16, 32, 64), min_length=1, description="Channels per resolution; n of them give the factor 2^(n-1)."
    )
    layers_per_block: int = Field(1, ge=1, description="Residual layers per resolution.")
    latent_channels: int = Field(4, ge=1, description="Channels of the latent.")
    norm_groups: int = Field(8, ge=1, description="Groups of the group norms; must divide every block's channels.")
    mid_attention: bool = Field(False, description="Self-attention at the lowest resolution.")
    steps: int = Field(300, ge=1, description="Optimiser steps.")
    batch_size: int = Field(32, ge=1, description="Images per step.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    warmup_steps: int = Field(20, ge=0, description="Linear warm-up over these first steps.")
    decay_share: float = Field(0.3, gt=0, le=1, description="Share of the steps, at the end, of a linear decay to 0.")
    l1_weight: float = Field(1.0, ge=0, description="Weight of the mean absolute error, on [-1, 1] pixels.")
    mse_weight: float = Field(1.0, ge=0, description="Weight of the mean squared error.")
    kl_weight: float = Field(1e-4, ge=0, description="Weight of the KL divergence per latent element.")
    gradient_clip: float = Field(100.0, gt=0, description="Largest gradient norm.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of weights, order of images and posterior draws.")

    @model_validator(mode="after")
    def _check(self) -> FitConfig:
        bad = [c for c in self.block_out_channels if c < 1 or c % self.norm_groups]
        if bad:
            raise ValueError(f"norm_groups {self.norm_groups} must divide every block_out_channels, not {bad}")
        if self.l1_weight == 0 and self.mse_weight == 0:
            raise ValueError("l1_weight and mse_weight cannot both be 0: nothing would be reconstructed")
        return self

    @property
    def factor(self) -> int:
        """Pixels per latent cell along one side."""
        return int(2 ** (len(self.block_out_channels) - 1))


class CodecOutputConfig(StrictModel):
    """Where the fitted codec goes."""

    uri: str = Field(..., min_length=1, description="Directory or fsspec URI that receives the codec.")


class FitCodecJobConfig(StrictModel):
    """Everything the fit_codec job reads."""

    source: SourceConfig = Field(..., description="The images to fit on.")
    image: ImageConfig = Field(..., description="How they are decoded and sized; one fixed size.")
    output: CodecOutputConfig = Field(..., description="Where the codec goes.")
    fit: FitConfig = Field(FitConfig(), description="Shape and recipe.")
    threads: int | None = Field(None, ge=1, description="CPU threads; default all cores. Not part of the identity.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU when there is one.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow tracking.")

    @model_validator(mode="after")
    def _one_size(self) -> FitCodecJobConfig:
        sides = self.image.resolutions
        if self.image.buckets.kind != "square" or len(sides) > 1 or self.image.flip:
            raise ValueError("image: a codec is fitted on one square resolution, without flip")
        if sides[0] % self.fit.factor:
            raise ValueError(f"image.resolution {sides[0]} must be a multiple of the factor {self.fit.factor}")
        return self


class FitIdentity(StrictModel):
    """What decides the fitted weights: two jobs that agree on it fit the same codec."""

    source: SourceConfig = Field(..., description="As in FitCodecJobConfig.")
    image: ImageConfig = Field(..., description="As in FitCodecJobConfig.")
    fit: FitConfig = Field(..., description="As in FitCodecJobConfig.")
