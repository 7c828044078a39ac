"""Configuration of the jobs that look after a dataset: verify and compact."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config import StrictModel
from pipeline.store.read.dataset import DatasetConfig
from pipeline.tracking.config import TrackingConfig


class DecodeCheckConfig(StrictModel):
    """What level=decode compares."""

    sample: int = Field(64, ge=1, description="Rows compared with their images.")
    seed: int = Field(0, ge=0, description="Which rows those are.")
    tolerance: float = Field(
        0.02,
        ge=0,
        description="Largest difference from encoding the image again, relative to the latent's standard deviation; "
        "0 on the kind of device that encoded asks for the same bytes.",
    )
    min_psnr_db: float | None = Field(
        None, description="Least PSNR of a decoded latent against its exact crop, dB; null: reported, not judged."
    )
    device: str = Field("auto", description="Where the codec runs: auto, cpu, cuda, cuda:1, ...")
    source_uri: str | None = Field(None, description="Where the images are now; null: where they were.")
    codec_path: str | None = Field(None, description="Where the codec is now; null: where it was.")


class VerifyJobConfig(StrictModel):
    """Everything the verify job reads."""

    data: DatasetConfig = Field(..., description="The dataset to verify.")
    level: Literal["ledger", "files", "checksums", "decode"] = Field(
        "checksums",
        description="ledger: conservation only; files: sizes and footers too; checksums: every byte and every row; "
        "decode: a sample of latents against their images too.",
    )
    decode: DecodeCheckConfig = Field(DecodeCheckConfig(), description="What level=decode compares.")
    report: str | None = Field(None, description="Path or URI that receives the whole report as JSON.")
    gc: bool = Field(
        False,
        description="Afterwards remove orphan files older than the grace period: readers keep the state that they "
        "opened until it has been superseded for that long; no run can write meanwhile.",
    )
    gc_grace_s: float = Field(
        86_400.0, ge=0, description="How long, in seconds, files stay that some reader may use."
    )
    tracking: TrackingConfig = Field(TrackingConfig(), description="Where the verification is recorded.")


class CompactJobConfig(StrictModel):
    """Everything the compact job reads."""

    data: DatasetConfig = Field(..., description="The dataset to compact.")
    shard_bytes: int = Field(
        384 << 20, ge=1 << 16, description="Bytes of a shard, at most about: 65,536 rows at most."
    )
    row_group_bytes: int = Field(16 << 20, ge=1024, le=1 << 30, description="Latent bytes of a row group.")
    workers: int = Field(2, ge=1, description="Shards written at a time; each needs about three times its size.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="Where the compaction is recorded.")
