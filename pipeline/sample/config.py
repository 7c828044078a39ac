"""Configuration of the sample job. Imports no torch, ray, pyarrow or PIL."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config import StrictModel
from pipeline.dataflow.cluster import ClusterConfig, GpuShare
from pipeline.diffusion.solvers import SamplerName
from pipeline.tracking.config import TrackingConfig

MAX_BATCH_PIXELS = 1 << 27  # of what is drawn again: 128 images of 1024 x 1024


class RequestDefaults(StrictModel):
    """What every request has unless its own row says otherwise, and what is done with repeated ones."""

    height: int | None = Field(None, ge=1, description="Pixels; null: the size the model was trained on.")
    width: int | None = Field(None, ge=1, description="Pixels; null: the size the model was trained on.")
    any_size: bool = Field(False, description="Also accept sizes the model was not trained on.")
    steps: int = Field(25, ge=1, le=1000, description="Solver steps.")
    guidance: float = Field(
        1.0, ge=0, le=100, description="Classifier-free guidance scale; 1 is none (one evaluation a step)."
    )
    guidance_interval: tuple[float, float] | None = Field(
        None,
        description="Guidance acts where low < t <= high (1 is pure noise, a low of 0 included); null: everywhere.",
    )
    duplicates: Literal["refuse", "keep_first"] = Field(
        "refuse", description="Two requests for the same image: refuse the job, or draw it once and count the rest."
    )


class GridRequests(RequestDefaults):
    """Every class with every prompt, each with every seed; without classes every prompt, and the other way round."""

    kind: Literal["grid"] = Field(..., description="A grid written in the configuration.")
    classes: Literal["all"] | tuple[int, ...] | None = Field(
        None, description="Class labels to draw: all, or a list; null with no prompts draws unconditional images."
    )
    prompts: tuple[str, ...] = Field(
        (),
        description="Prompts to draw, for models trained with text; where there are classes, each with each class.",
    )
    negative_prompt: str | None = Field(None, description="What guidance leads away from; null: the empty prompt.")
    count: int = Field(
        1, ge=1, description="Images for each class with each prompt: seeds first_seed, first_seed + 1, ..."
    )
    first_seed: int = Field(0, ge=0, lt=2**62, description="First of the counted seeds.")
    seeds: tuple[int, ...] | None = Field(None, min_length=1, description="Seeds to use instead of counted ones.")

    @model_validator(mode="after")
    def _one_way_to_seed(self) -> GridRequests:
        if self.seeds is not None and {"count", "first_seed"} & self.model_fields_set:
            raise ValueError("give either seeds or count and first_seed")
        return self


class FileRequests(RequestDefaults):
    """One request a row of a Parquet, CSV or JSON Lines file."""

    kind: Literal["file"] = Field(..., description="Requests from a file.")
    uri: str = Field(..., min_length=1, description="The file: a path or fsspec URI.")
    format: Literal["auto", "parquet", "csv", "jsonl"] = Field("auto", description="auto goes by the ending.")
    columns: dict[str, str] = Field(
        {},
        description="Request field -> column of the file. Fields: label, prompt, negative_prompt, seed, height, "
        "width, steps, guidance, guidance_low, guidance_high; a field not named is the column of its name.",
    )
    other_columns: Literal["refuse", "keep", "drop"] = Field(
        "refuse", description="Columns that are no field: refuse, keep (written beside the image as JSON), or drop."
    )
    max_bytes: int = Field(
        256 << 20,
        ge=1,
        description="Bytes of the file, and of its cells as JSON: they are held in memory, some five times as large.",
    )
    default_seed: int = Field(0, ge=0, lt=2**63, description="Seed of rows that name none.")


RequestsConfig = Annotated[GridRequests | FileRequests, Field(discriminator="kind")]


class SampleModelConfig(StrictModel):
    """The model that draws."""

    uri: str = Field(
        ...,
        min_length=1,
        description="Export, training checkpoint (or a directory of either: the newest), or diffusers pipeline "
        "directory: a path or fsspec URI; or a registered model: models:/NAME@ALIAS, models:/NAME/VERSION.",
    )
    ema: str | None = Field(
        None,
        description="Name of the averaged weights: picks one of a checkpoint's (raw: none), must be an export's; "
        "null: a checkpoint's first, an export's whichever.",
    )
    codec: str | None = Field(
        None, description="Codec directory; null: where the model says it is. Its weights must be the same."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Arithmetic of model and codec; auto is bfloat16 on a GPU, float32 on a CPU."
    )
    compile: bool = Field(False, description="torch.compile the model: slow start, faster on a GPU.")


class SampleOutputConfig(StrictModel):
    """Where the images go, and in which form."""

    uri: str = Field(..., min_length=1, description="Directory or fsspec URI that receives the images.")
    format: Literal["parquet", "files", "webdataset"] = Field(
        "parquet",
        description="parquet: image bytes in Parquet rows; files: one file per image under images/; webdataset: one "
        "tar per unit of requests under shards/. Rows name what lies outside them.",
    )
    image: Literal["png", "jpeg", "webp"] = Field("png", description="Encoding of each image.")
    quality: int = Field(95, ge=1, le=100, description="Quality of jpeg and webp (webp: 100 is lossless).")
    contact: int = Field(64, ge=0, le=400, description="Images on the contact sheet and in the gallery; 0: neither.")


class SolverConfig(StrictModel):
    """How noise becomes latents."""

    name: SamplerName = Field(
        "auto",
        description="euler or heun (flow models only), ddim or dpmpp (any); auto: euler for flows, else dpmpp. euler "
        "takes some contrast away, 5 % in 25 steps; dpmpp does not at the same cost, nor heun at twice that.",
    )
    shift: float | None = Field(
        None,
        gt=0,
        description="Shift of the time grid towards noise, flow models only; null: what the export advises.",
    )


class StageConfig(StrictModel):
    """One stage of actors."""

    actors: int | None = Field(None, ge=1, description="Number of actors; null: as many as GPUs, else as CPUs allow.")
    num_cpus: float | None = Field(None, gt=0, description="CPUs each actor reserves; null: an equal share.")
    num_gpus: GpuShare | None = Field(
        None, description="GPUs each actor reserves, fractions share one; null: a part of each GPU there is."
    )


class PromptConfig(StrictModel):
    """The actor that embeds prompts, where the model reads text: one for the whole job."""

    num_cpus: float = Field(0.2, gt=0, description="CPUs it reserves.")
    num_gpus: GpuShare | None = Field(None, description="GPUs it reserves; null: a part of one, where there is one.")
    cache_bytes: int = Field(1 << 30, ge=1, description="Embeddings it keeps, so that a prompt is computed once.")


class WriteConfig(StrictModel):
    """How images are encoded and committed."""

    encoders: int | None = Field(
        None, ge=1, description="Tasks at a time that encode PNG, JPEG or WebP; null: two for each GPU, at least two."
    )
    encoder_cpus: float = Field(0.2, gt=0, description="CPUs such a task reserves.")
    writers: int = Field(2, ge=1, description="Write tasks at a time.")
    fragment_rows: int = Field(256, ge=1, description="Images a write waits for before it commits a fragment.")
    row_group_bytes: int = Field(16 << 20, ge=1024, le=1 << 30, description="Image bytes of a row group.")


class SampleJobConfig(StrictModel):
    """Everything the sample job reads."""

    model: SampleModelConfig = Field(..., description="The model that draws.")
    output: SampleOutputConfig = Field(..., description="Where the images go.")
    requests: RequestsConfig = Field(..., description="What is drawn: a grid, or a file with one request a row.")
    sampler: SolverConfig = Field(SolverConfig(), description="How noise becomes latents.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the run: another one draws every request anew.")
    batch_size: int = Field(
        16, ge=1, description="Images a batch; the last one is padded, so that every batch has one shape."
    )
    threads: int = Field(
        1, ge=1, description="Torch threads of each CPU actor; they decide last bits, so all images share them."
    )
    unit_requests: int = Field(64, ge=1, description="Requests a unit of work, the quantum of planning and retries.")
    units_per_execution: int = Field(
        10_000, ge=1, description="Units in one Ray Data execution; the next one begins in the tail of the last."
    )
    reject_budget: float = Field(
        0.0, ge=0, le=1, description="Share of requests that may be rejected; more is exit 5."
    )
    denoise: StageConfig = Field(StageConfig(), description="The actors that run the diffusion model.")
    decode: StageConfig = Field(StageConfig(), description="The actors that run the codec.")
    prompts: PromptConfig = Field(PromptConfig(), description="The actor that embeds prompts.")
    write: WriteConfig = Field(WriteConfig(), description="How images are encoded and committed.")
    cluster: ClusterConfig = Field(ClusterConfig(), description="The Ray cluster.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow tracking.")


class RegenerateJobConfig(StrictModel):
    """Everything the regenerate job reads."""

    image: str = Field(..., min_length=1, description="The image: a file that jobs.sample made, path or fsspec URI.")
    output: str = Field(..., min_length=1, description="Receives the image drawn again.")
    model_uri: str | None = Field(
        None, min_length=1, description="Where the model lies; null: where the image says, as far as places allows."
    )
    codec: str | None = Field(
        None, min_length=1, description="Where the codec lies; null: where the image says, as far as places allows."
    )
    places: tuple[str, ...] = Field(
        (),
        description="Paths, URIs or hub ids that are followed where the image names them or what lies below.",
    )
    max_pixels: int = Field(
        MAX_BATCH_PIXELS,
        ge=1,
        description="Pixels of a batch, as the image says it was drawn; with more it is refused unread.",
    )
