"""Configuration of the training job, its stream included; every count of progress is in images over all workers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config import StrictModel, renamed_from
from pipeline.dataflow.cluster import ClusterConfig
from pipeline.diffusion.config import ObjectiveConfig, SamplerConfig, TimestepConfig
from pipeline.diffusion.solvers import solver_for
from pipeline.features import ExtractorConfig
from pipeline.model.config import ModelConfig
from pipeline.tracking.config import RegistryConfig, TrackingConfig

# -- The stream: what decides the order, and what only decides how it is fetched -------------------------------


class StreamConfig(StrictModel):
    """How latents are shuffled and fetched; the last three fields are no part of the order."""

    lanes: int = Field(
        8,
        ge=1,
        description="Parts a global batch is cut into. It must divide the batch size, and the number of "
        "workers must divide it: it is the largest number of workers a run can ever use.",
    )
    window_bytes: int = Field(
        1 << 30,
        ge=1,
        description="Bytes of stored rows held for shuffling by all workers together. Each lane shuffles "
        "its share at a time, up to 512 parts from all over the dataset, of 256 KiB or more, of 4 MiB or more after "
        "jobs.compact order=shuffled; a worker holds its lanes' share. Of several datasets (data.mix) each gets what "
        "it cannot do without, and the rest goes by weight.",
    )
    shuffle: bool = Field(True, description="Shuffle parts of row groups and their rows anew in every epoch.")
    holdout: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Share of images, chosen by the hash of their files, kept out of training for validation in "
        "every variant and copy. Needs one pass over ids and hashes (48 bytes a row), which is cached.",
    )
    prefetch: int = Field(4, ge=1, description="Batches prepared ahead of the training step, of each dataset.")
    threads: int = Field(
        2,
        ge=1,
        description="Threads that read and shuffle windows, and as many that copy large latents into batches, in "
        "each worker, for each dataset.",
    )
    verify: bool = Field(
        False,
        description="Check page checksums: a worker reads each row group as a whole, once in a run, before its first "
        "part is used. Until all were, about half the rows a second.",
    )


Share = Annotated[float, Field(ge=0, lt=1)]
# Embeddings of captions, one URI for each of a model's text encoders; a single one may stand for itself.
Texts = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    Field(strict=False),
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given or []),
]


class MixConfig(StrictModel):
    """A dataset to learn from, among others; all of them are made by one codec."""

    uri: str = Field(..., min_length=1, description="Latent dataset: a directory or any fsspec URI.")
    weight: float = Field(
        1.0, gt=0, description="Its part of the images served, in proportion to the weights of all that are served."
    )
    from_images: int = Field(0, ge=0, description="Served once so many images of the run are done.")
    until_images: int | None = Field(
        None,
        ge=1,
        description="Served until so many images of the run are done, to be followed by another dataset from there "
        "on, as 256 px by 512 px; null: to the end. Statistics and validation are of all datasets at all times.",
    )
    text: Texts = Field(
        (),
        description="Embeddings of its captions, made by jobs.embed_text: one URI, or those of the model's encoders "
        "in their order (SDXL: [l, g]; SD3: [l, g, t5]; FLUX: [clip, t5]); none: no text. All datasets have them or "
        "none.",
        json_schema_extra=renamed_from("text_uri"),
    )
    captions: tuple[str, ...] = Field(
        ("caption",),
        description="Where there is text: the texts of a row that are its captions, caption or extra.NAME, a field "
        "that source.extra kept: a text or a list of them. Of several one is drawn, in every epoch anew.",
    )
    where: str | None = Field(
        None,
        min_length=1,
        description="Rows to learn from, by stored columns: original_height >= 512 and extra.aesthetic > 5.5. Needs "
        "one pass over these columns, which is cached; classes and statistics stay those of all rows.",
    )

    @model_validator(mode="after")
    def _served_at_all(self) -> MixConfig:
        if self.until_images is not None and self.until_images <= self.from_images:
            raise ValueError(f"until_images {self.until_images} must be above from_images {self.from_images}")
        if self.captions != ("caption",) and not self.text:
            raise ValueError(f"captions {list(self.captions)} are learned by their embeddings: they need text")
        return self


class TrainDataConfig(MixConfig):
    """The latents to learn from: one dataset, or several."""

    normalise: Literal["dataset", "codec"] | None = Field(
        None,
        description="What latents are normalised by: the statistics of the data, or the codec's own scale and shift, "
        "which published models learned with. null: as the weights of model.init learned, without any: dataset.",
    )
    text_cache_bytes: int = Field(
        1 << 30,
        ge=1,
        description="Embeddings read ahead from a remote store that a worker keeps in memory, shared by weight with "
        "those of data.mix. Where a window's do not fit, each batch's are read for themselves, by more requests.",
    )
    mix: tuple[MixConfig, ...] = Field(
        (),
        description="Further datasets: [{uri, weight, text, where, ...}]. Every batch is of one dataset; within each "
        "1,024 steps each has its part exactly, whatever the sizes. A class number must mean the same in all.",
    )

    @property
    def parts(self) -> dict[str, MixConfig]:
        """Every dataset by the key of its section: "data" first, then "data.mix.0" and so on."""
        return {"data": self, **{f"data.mix.{at}": part for at, part in enumerate(self.mix)}}


class TrainOutputConfig(StrictModel):
    """Where the run lives."""

    uri: str = Field(
        ..., min_length=1, description="Checkpoints, history and the exported model: a directory or fsspec URI."
    )


class EmaConfig(StrictModel):
    """One average of the weights."""

    name: str = Field(..., pattern=r"^[a-z0-9][a-z0-9_.-]{0,39}$", description="Its name in checkpoints and figures.")
    sigma_rel: float | None = Field(
        None, gt=0, lt=0.2886, description="Power-function average: its relative width (Karras et al. 2024)."
    )
    half_life_images: float | None = Field(None, gt=0, description="Exponential average: its half-life in images.")

    @model_validator(mode="after")
    def _one_kind(self) -> EmaConfig:
        if (self.sigma_rel is None) == (self.half_life_images is None):
            raise ValueError(f"track {self.name!r} needs exactly one of sigma_rel and half_life_images")
        return self


class TrainConfig(StrictModel):
    """How long, how fast, on how many workers."""

    images: int = Field(..., ge=1, description="Length of the run in images (steps times batch_size).")
    batch_size: int = Field(..., ge=1, description="Global batch; the same whatever the number of workers.")
    micro_batch: int = Field(
        256, ge=1, description="Most samples of one forward pass on one worker; the rest is accumulated."
    )
    seed: int = Field(0, ge=0, lt=1 << 32, description="Keys the order, the noise, the times and the first weights.")
    num_workers: int = Field(1, ge=1, description="Ray Train workers.")
    min_workers: int | None = Field(
        None, ge=1, description="Elastic: go on with as few as these when nodes are lost; null: exactly num_workers."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="cuda: each worker reserves a GPU; cpu: none does; auto: cuda when the cluster has GPUs, which "
        "must suffice. What reserved GPUs compute on: cluster.device.",
    )
    num_cpus: float = Field(
        1,
        gt=0,
        description="CPUs reserved for, and used by, each worker.",
        json_schema_extra=renamed_from("cpus_per_worker"),
    )
    strategy: Literal["ddp", "fsdp2", "hsdp"] = Field(
        "ddp",
        description="ddp: a whole model per worker; fsdp2: weights and optimiser sharded over all workers; hsdp: "
        "over those of a node, of which each has a whole model and as many workers.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Arithmetic of the forward pass; weights and averages stay fp32 (bf16 is slow on CPU)."
    )
    tf32: bool = Field(
        True, description="On GPUs, products of fp32 matrices in TensorFloat-32 (10 bits of mantissa); never on CPUs."
    )
    compile: bool = Field(False, description="torch.compile, block by block where the model has blocks.")
    optimizer: Literal["adamw", "muon", "schedule_free"] = Field(
        "adamw",
        description="adamw; muon: torch's Muon for matrices, embeddings aside, with steps of AdamW's size; AdamW for "
        "the rest (strategy=ddp); schedule_free: AdamW whose own average is validated, averaged and exported.",
    )
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate.")
    warmup_images: int = Field(0, ge=0, description="Linear warm-up over these first images.")
    decay_images: int = Field(0, ge=0, description="Decay over these last images.")
    decay_shape: Literal["cosine", "linear"] = Field("cosine", description="Shape of the decay.")
    decay_final_ratio: float = Field(0.0, ge=0, le=1, description="Share of the peak left at the end.")
    betas: tuple[Share, Share] = Field((0.9, 0.99), description="AdamW's two decay rates.")
    eps: float = Field(1e-8, gt=0, description="AdamW's denominator floor.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay of matrices; vectors are not decayed.")
    clip_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this total norm.")
    guard_norm: float = Field(
        1e4, gt=0, description="A step whose gradient norm is above this, or not finite, is skipped on all workers."
    )
    max_skipped_in_a_row: int = Field(
        10, ge=1, description="After this many skipped steps in a row the weights go back to the last checkpoint."
    )
    max_rollbacks: int = Field(
        2, ge=0, description="Times that may happen, the batches in between left out; then the run stops."
    )
    label_dropout: float = Field(
        0.1, ge=0, le=1, description="Share of samples trained without their label, for guidance."
    )
    text_dropout: float = Field(
        0.1, ge=0, le=1, description="Share of samples trained on the empty prompt, for guidance."
    )
    joint_dropout: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Where there are labels and texts: share trained without either, for guidance; from the others "
        "label_dropout and text_dropout take each by a draw of its own, so that either can be asked for alone.",
    )
    conditional: bool = Field(True, description="false: ignore labels even where the dataset has them.")
    ema: tuple[EmaConfig, ...] = Field(
        (EmaConfig(name="ema", sigma_rel=0.05),),
        description="Averages of the weights; the first is used for grids and export.",
    )
    log_images: int = Field(2048, ge=1, description="Figures are logged each time this many images are done.")
    profile_steps: int = Field(
        0,
        ge=0,
        description="Steps of each start, from its third on, that torch's profiler records on rank 0: "
        "profiles/<start>.json.gz, for chrome://tracing or Perfetto.",
    )
    system_metrics_s: float | None = Field(
        None,
        gt=0,
        description="Seconds between MLflow's system metrics of each node, with those of NVIDIA GPUs where "
        "nvidia-ml-py is installed; null: none.",
    )
    max_failures: int = Field(3, ge=-1, description="Lost workers tolerated before the job fails; -1: any number.")

    @model_validator(mode="after")
    def _sizes_fit(self) -> TrainConfig:
        if self.batch_size < self.num_workers:
            raise ValueError(f"batch_size {self.batch_size} must be at least num_workers {self.num_workers}")
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} must not exceed num_workers {self.num_workers}")
        if self.optimizer == "muon" and self.strategy != "ddp":
            raise ValueError(f"optimizer muon needs whole matrices: set strategy=ddp, not {self.strategy}")
        if self.optimizer == "schedule_free" and self.decay_images:
            raise ValueError(
                f"decay_images {self.decay_images} must be 0 with optimizer schedule_free: its average stands for it"
            )
        names = [t.name for t in self.ema]
        if len(set(names)) != len(names):
            raise ValueError(f"ema names must differ, got {names}")
        return self

    @property
    def world_sizes(self) -> range:
        """Every number of workers the run may have."""
        return range(self.min_workers or self.num_workers, self.num_workers + 1)


class CheckpointConfig(StrictModel):
    """When checkpoints are taken and which are kept."""

    every_images: int = Field(65536, ge=1, description="A checkpoint each time this many images are done.")
    keep_last: int = Field(2, ge=1, description="Newest checkpoints kept.")
    keep_every_images: int | None = Field(
        None, ge=1, description="Besides, the first checkpoint after each multiple of this is kept for good."
    )


class ValidationConfig(StrictModel):
    """Loss on held-out samples at fixed times with fixed noise."""

    every_images: int = Field(16384, ge=1, description="Measured each time this many images are done.")
    images: int = Field(
        0,
        ge=0,
        description="Held-out samples asked, of several datasets by weight, in whole chunks; 0: no validation.",
    )
    timesteps: int = Field(4, ge=1, description="Strata of time at which each sample is asked.")
    chunk: int = Field(16, ge=1, description="Samples of one forward pass; fixed, so that results are comparable.")


class GridConfig(StrictModel):
    """Pictures drawn from the first EMA track at fixed seeds while training."""

    every_images: int | None = Field(
        None, ge=1, description="Drawn each time this many images are done; null: never."
    )
    images: int = Field(16, ge=1, le=256, description="Pictures in a grid; classes and prompts take turns.")
    prompts: tuple[str, ...] = Field(
        (),
        description="What they show, of a model that reads text; embedded before by jobs.embed_text prompts=[...]. "
        "none: the first captions of the data.",
    )
    sampler: SamplerConfig = Field(SamplerConfig(guidance=2.0), description="How they are sampled.")


class DistanceConfig(StrictModel):
    """Frechet and kernel distance of draws from the first EMA track to the data, while training."""

    every_images: int | None = Field(
        None, ge=1, description="Measured each time this many images are done; null: never."
    )
    images: int = Field(
        1024,
        ge=32,
        description="Rows of the first dataset, held-out ones where there are any, that as many draws with their "
        "labels and texts are compared with. Both are decoded. At few images both distances are large: compare "
        "at equal numbers.",
    )
    extractor: ExtractorConfig | None = Field(
        None, description="The feature space: kind torchscript, torchvision or timm, as in the evaluate job."
    )
    sampler: SamplerConfig = Field(SamplerConfig(), description="How they are drawn.")


class CodecOverride(StrictModel):
    """Where the dataset's codec lies now."""

    path: str | None = Field(
        None, description="Codec to decode grids with and to name in the export; null: the one the dataset names."
    )
    revision: str | None = Field(None, description="Commit or tag that pins a hub id.")
    kind: str = Field("auto", description="auto, or the name of a codec plug-in.")


class LoraConfig(StrictModel):
    """Low-rank adapters (Hu et al. 2021) trained beside frozen weights of model.init."""

    rank: int = Field(16, ge=1, description="Columns of the two matrices beside each weight.")
    alpha: int | None = Field(None, ge=1, description="What is learned counts alpha / rank times; null: rank.")
    targets: tuple[str, ...] = Field(
        (), description="Layers, by the ends of their names; none: the projections of attention."
    )
    merge: bool = Field(
        False, description="Export the weights with the adapters added; false: the adapters alone, for diffusers."
    )


class ExportConfig(StrictModel):
    """What the trained model is written as."""

    license: str | None = Field(
        None,
        min_length=1,
        description="Licence of the weights, for the model card. null: that of the weights of model.init, which must "
        "then state one; else unknown.",
    )
    pipeline: bool = Field(
        True,
        description="A whole diffusers pipeline where there is one that draws with this network, codec included; "
        "false: the network alone.",
    )
    text_encoders: Literal["copy", "reference"] = Field(
        "copy", description="Whether text encoders and tokenizers lie in it, or are named in its model card."
    )


class EmaJobConfig(StrictModel):
    """Export an average of any length after a run: `python -m jobs.ema run=... sigma_rel=... output=...`."""

    run: str = Field(..., min_length=1, description="The run: output.uri of jobs.train.")
    sigma_rel: float = Field(
        ..., gt=0, lt=0.2886, description="Relative width of the average (Karras et al. 2024), as in train.ema."
    )
    images: int | None = Field(
        None, ge=1, description="As of how many images seen, a kept checkpoint's; null: the newest checkpoint's."
    )
    output: str = Field(..., min_length=1, description="The export: a directory or fsspec URI.")
    export: ExportConfig = Field(ExportConfig(), description="What it is written as.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="Where the run is recorded.")


class TrainJobConfig(StrictModel):
    """Train a diffusion model on a latent dataset: `python -m jobs.train CONFIG... [key=value ...]`."""

    data: TrainDataConfig = Field(..., description="The latents.")
    output: TrainOutputConfig = Field(..., description="The run's own place.")
    model: ModelConfig = Field(..., description="The network.")
    lora: LoraConfig | None = Field(None, description="Train adapters alone; null: all weights.")
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="What it predicts.")
    timesteps: TimestepConfig = Field(TimestepConfig(), description="At which times.")
    train: TrainConfig = Field(..., description="How it is trained.")
    stream: StreamConfig = Field(StreamConfig(), description="How the latents are shuffled and fetched.")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="What survives a crash.")
    validation: ValidationConfig = Field(ValidationConfig(), description="Loss on held-out samples.")
    grid: GridConfig = Field(GridConfig(), description="Pictures while training.")
    distance: DistanceConfig = Field(DistanceConfig(), description="How far pictures are from the data.")
    codec: CodecOverride = Field(CodecOverride(), description="The codec of the latents.")
    export: ExportConfig = Field(ExportConfig(), description="What the trained model is written as.")
    cluster: ClusterConfig = Field(ClusterConfig(), description="Where Ray runs.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="Where the run is recorded.")
    registry: RegistryConfig = Field(RegistryConfig(), description="Where the finished model is registered.")

    @model_validator(mode="after")
    def _sections_fit(self) -> TrainJobConfig:
        if self.validation.images and not self.stream.holdout:
            raise ValueError(f"validation.images {self.validation.images} needs stream.holdout above 0")
        drawing: dict[str, GridConfig | DistanceConfig] = {"grid": self.grid, "distance": self.distance}
        for name, section in ((n, s) for n, s in drawing.items() if s.every_images is not None):
            if not self.train.ema:
                raise ValueError(f"{name}.every_images needs at least one train.ema track")
            try:
                solver_for(section.sampler.name, self.objective.kind)
            except ValueError as error:
                raise ValueError(f"{name}.sampler.name: {error}") from None
        extractor = self.distance.extractor
        if self.distance.every_images is not None and (extractor is None or extractor.kind == "classifier"):
            raise ValueError(
                "distance.every_images needs distance.extractor of kind torchscript, torchvision or timm"
            )
        if self.lora is not None and self.model.init is None:
            raise ValueError("lora trains adapters to weights that there are: it needs model.init")
        if self.lora is not None and self.model.init is not None and self.model.init.absent == "random":
            raise ValueError("lora trains adapters to weights that there are: set model.init.absent=refused")
        uneven = [n for n in self.train.world_sizes if self.stream.lanes % n]
        if uneven:
            raise ValueError(
                f"stream.lanes {self.stream.lanes} must be a multiple of every number of workers, not so {uneven}"
            )
        return self
