"""Configuration of the encode job."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.codec.config import CodecConfig
from pipeline.config import StrictModel, renamed_from
from pipeline.dataflow.cluster import ClusterConfig, GpuShare
from pipeline.source.config import ImageConfig, SourceConfig
from pipeline.source.reasons import Reason
from pipeline.tracking.config import TrackingConfig


class EncodeOutputConfig(StrictModel):
    """Where the dataset of latents goes."""

    uri: str = Field(..., min_length=1, description="Root of the latent dataset: a directory or any fsspec URI.")


class EncodeConfig(StrictModel):
    """How the work is cut, spread and committed."""

    unit_rows: int | None = Field(
        None,
        ge=1,
        description="Images per unit of work when the source is single files; null: 2048, or for fewer than 32,768 "
        "new images a sixteenth of them, at least 64.",
    )
    unit_bytes: int = Field(1 << 30, ge=1, description="Source bytes at which such a unit ends early.")
    latent_dtype: Literal["float16", "bfloat16"] = Field("float16", description="How latents are stored.")
    batch_size: int = Field(16, ge=1, description="Images of the largest bucket per VAE call; smaller ones get more.")
    actors: int | None = Field(None, ge=1, description="Encoder actors; null: one per GPU, else one per CPU.")
    num_cpus: float | None = Field(
        None,
        gt=0,
        description="CPUs an actor reserves; null: its share of what reads and writes leave, beside a GPU of its "
        "node, without one at most 1.",
        json_schema_extra=renamed_from("actor_cpus"),
    )
    num_gpus: GpuShare | None = Field(
        None,
        description="GPUs an actor reserves, a part of one or whole ones; null: 1 where there are any.",
        json_schema_extra=renamed_from("actor_gpus"),
    )
    threads_per_actor: int | None = Field(
        None,
        ge=1,
        description="Torch threads per actor; null: 1 beside a GPU, else the CPUs it reserves. With more than one on "
        "a CPU the last bits of a latent may depend on its place in the batch.",
    )
    decode: Literal["actor", "tasks"] = Field(
        "actor", description="Decode in threads beside the device, or in tasks of their own on CPU nodes."
    )
    decode_threads: int | None = Field(
        None, ge=1, description="Decode threads of an actor; null: the CPUs it reserves beside a GPU, else 2."
    )
    decode_cpus: float = Field(1.0, gt=0, description="CPUs of a decode task, with decode=tasks.")
    read_cpus: float = Field(0.25, gt=0, description="CPUs a read task reserves.")
    write_cpus: float = Field(0.25, gt=0, description="CPUs a write task reserves.")
    writers: int = Field(4, ge=1, description="Write tasks at a time.")
    fragment_bytes: int = Field(
        64 << 20, ge=1, description="Latent bytes a write waits for before it commits a fragment."
    )
    fragment_rows: int = Field(8192, ge=1, description="Rows after which it commits even so: what a crash can cost.")
    row_group_bytes: int = Field(
        16 << 20, ge=1024, le=1 << 30, description="Latent bytes of a row group, the quantum of shuffling."
    )
    units_per_execution: int = Field(
        10_000, ge=1, description="Units in one Ray Data execution; the next one begins in the tail of the last."
    )
    drivers: int = Field(
        1,
        ge=1,
        description="Executions at a time, of disjoint units, each with its part of the actors and writers; of more "
        "than one each has a process of its own that drives it: one hands out some 100,000 images a second.",
    )
    crash_limit: int = Field(
        5, ge=1, description="Passes in which workers died and nothing got done, before the job stops (exit code 75)."
    )
    retry_rejects: tuple[str, ...] = Field((), description="Reject or filter reasons to try again in this run.")
    pictures: int = Field(
        4,
        ge=0,
        le=16,
        description="Images that an encoder shows beside what their latents decode to, with the tracked run: of its "
        "first block, at most 256 pixels of each side, and not with codec.compile; 0: none, nor of what was "
        "left out.",
    )
    reread: tuple[Literal["captions"], ...] = Field(
        (),
        description="[captions]: read the captions, labels and further fields of all stored rows again, with the "
        "settings of now, and encode no pixel for it.",
    )
    dedup: Literal["off", "exact"] = Field(
        "off",
        description="exact: of images with the same bytes only the first in plan order stays, with its caption and "
        "label; the others are filtered as duplicate_content. Can be turned on at any time.",
    )
    dedup_memory_bytes: int = Field(
        1 << 30,
        ge=1 << 20,
        description="Memory of each process that compares hashes; more rows than fit are cut into shares by their "
        "hash, which the cluster at RAY_ADDRESS, or this machine without one, compares side by side.",
    )
    reject_budget: float = Field(
        0.1, ge=0, le=1, description="Largest share of rejected rows; above it the job ends with exit code 5."
    )
    failure_budget: float = Field(
        0.001,
        ge=0,
        le=1,
        description="Largest share of rows that were decoded and then failed in the codec or ended its process "
        "(encode_failed, bad_latent, quarantined), for which the source is rarely to blame; a single row is within "
        "it unless it is 0.",
    )
    on_removed: Literal["keep", "drop"] = Field(
        "keep", description="What becomes of latents whose source is gone: kept and reported, or no longer visible."
    )

    @field_validator("dedup", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        # YAML 1.1 reads a bare `off` as false.
        return "off" if value is False else value


class EstimateConfig(StrictModel):
    """What a dry run reckons with."""

    utilisation: float = Field(0.4, gt=0, le=1, description="Share of a GPU's peak that the VAE reaches.")
    price_per_hour: dict[str, float] = Field(
        default_factory=dict,
        description="Price of one GPU hour by GPU name (A100, H100, H200, L4, T4); own names need peak_tflops too.",
    )
    peak_tflops: dict[str, float] = Field(
        default_factory=dict, description="Dense half-precision peak of further GPUs, TFLOP/s, by name."
    )
    read_bytes_per_s: float = Field(
        500e6, gt=0, description="Latent bytes per second that training reads for one GPU: what an epoch costs then."
    )
    tar_image_bytes: int = Field(
        150_000, ge=1, description="Bytes assumed of an image in a tar file, whose images a dry run does not count."
    )


class EncodeJobConfig(StrictModel):
    """Everything the encode job reads."""

    source: SourceConfig = Field(..., description="The images to encode.")
    image: ImageConfig = Field(ImageConfig(), description="From bytes to pixels of a bucket's size.")
    codec: CodecConfig = Field(..., description="The VAE that encodes them.")
    output: EncodeOutputConfig = Field(..., description="Where the latents go.")
    encode: EncodeConfig = Field(EncodeConfig(), description="How the work is cut, spread and committed.")
    estimate: EstimateConfig = Field(EstimateConfig(), description="What a dry run reckons with.")
    cluster: ClusterConfig = Field(ClusterConfig(), description="Where Ray runs.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow tracking.")

    @model_validator(mode="after")
    def _reasons_exist(self) -> EncodeJobConfig:
        unknown = [r for r in self.encode.retry_rejects if r not in set(Reason)]
        if unknown:
            raise ValueError(f"encode.retry_rejects: {unknown} are no reasons; choose from {sorted(Reason)}")
        return self
