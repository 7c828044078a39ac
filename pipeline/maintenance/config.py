"""Configuration of the jobs that look after a dataset, and of the one that hands it to others: export."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config import StrictModel
from pipeline.dataflow.cluster import ClusterConfig
from pipeline.source.config import MAX_PIXELS, ImageConfig, ParquetSource
from pipeline.store.read.dataset import DatasetConfig
from pipeline.tracking.config import TrackingConfig

_SOURCE, _IMAGE = ParquetSource(uri="."), ImageConfig()  # limits are by default what they are for encode


class RecheckLimits(StrictModel):
    """What reading and decoding may cost here, whatever the dataset says that it was made with."""

    max_bytes: int = Field(_SOURCE.max_bytes, ge=1, description="Bytes of an image.")
    max_pixels: int = Field(_IMAGE.max_pixels, ge=1, le=MAX_PIXELS, description="Pixels of an image.")
    batch_pixels: int = Field(1 << 27, ge=1, description="Pixels of a batch that the codec encodes.")
    links: Literal["inside", "any"] = Field("inside", description="Links of a folder that are followed.")
    decode_cpu_s: float = Field(_IMAGE.decode_cpu_s, gt=0, description="CPU seconds of a decoder's child.")
    decode_memory_mb: int = Field(_IMAGE.decode_memory_mb, ge=256, description="Address space of such a child, MiB.")
    memory_mb: int = Field(_SOURCE.memory_mb, ge=512, description="Address space of Parquet's child, MiB.")


class DecodeCheckConfig(StrictModel):
    """What level=decode compares.

    Where images and codec lie is said here: what the dataset says is followed only as far as `places` allows.
    """

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
    source_uri: str | None = Field(
        None, description="Where the images are; null: where the dataset says, as far as places allows."
    )
    codec_path: str | None = Field(
        None, description="Where the codec is; null: where the dataset says, as far as places allows."
    )
    places: tuple[str, ...] = Field(
        (),
        description="Paths, URIs or hub ids that are followed where the dataset names them or what lies below.",
    )
    limits: RecheckLimits = Field(
        RecheckLimits(), description="What reading and decoding may cost; images are decoded in child processes."
    )


class VerifyJobConfig(StrictModel):
    """Everything the verify job reads."""

    data: DatasetConfig = Field(..., description="The dataset to verify.")
    level: Literal["ledger", "files", "checksums", "decode"] = Field(
        "checksums",
        description="ledger: conservation only; files: sizes and footers too; checksums: every byte and every row; "
        "decode: a sample of latents against their images too.",
    )
    since: str | None = Field(
        None,
        pattern=r"^(last|\d{4}-\d{2}-\d{2})$",
        description="Look at files that were written since: last, the last verification of this level that found "
        "nothing, or a day (2026-11-30, UTC); null: at all.",
    )
    share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Of the older files, the share to look at: each run goes on where the last one of this level "
        "ended, until all were looked at in turn. null: all, or none beside `since`.",
    )
    resume_s: float = Field(
        7 * 86_400.0,
        ge=0,
        description="A verification goes on with one of the same level, since and share that was killed or found "
        "something, and looks again at what was damaged alone, unless that began longer ago than so many seconds; "
        "0: all is looked at again.",
    )
    decode: DecodeCheckConfig = Field(DecodeCheckConfig(), description="What level=decode compares.")
    workers: int | None = Field(
        None,
        ge=1,
        description="Files checked at a time, each held in memory; null: as many as the cluster at RAY_ADDRESS, or "
        "this machine without one, has CPUs.",
    )
    cluster: ClusterConfig = Field(ClusterConfig(), description="The Ray cluster, where RAY_ADDRESS names one.")
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
    order: Literal["shuffled", "units"] | None = Field(
        None,
        description="shuffled: every shard holds rows from all over the dataset, later ones from all that was added "
        "since, so that data listed class by class are mixed for whoever reads them; units: rows in the order in "
        "which they were listed. null: shuffled for latents, units for all else. Another order or seed than that of "
        "the shards which are there makes all of them anew.",
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="What rows are shuffled by.")
    workers: int | None = Field(
        None,
        ge=1,
        description="Shards written at a time, each with a CPU and three times its size in memory; null: as many as "
        "the cluster at RAY_ADDRESS, or this machine without one, has room for.",
    )
    cluster: ClusterConfig = Field(ClusterConfig(), description="The Ray cluster, where RAY_ADDRESS names one.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="Where the compaction is recorded.")

    def shuffled_by(self, kind: str) -> int | None:
        """The seed by which rows of a dataset of this kind are shuffled; None where they stay in unit order."""
        return self.seed if self.order == "shuffled" or (self.order is None and kind == "latents") else None


class ForgetListConfig(StrictModel):
    """What is withdrawn: a table with some of the columns key, uri, content_sha256 and phash, a name a cell."""

    uri: str = Field(..., min_length=1, description="Path or URI of a .parquet or .csv file.")
    source: str | None = Field(
        None,
        description="source.name that keys belong to; null: all that the dataset was encoded from.",
    )
    phash_distance: int = Field(
        0, ge=0, le=16, description="Bits in which a perceptual hash may differ from a listed one."
    )
    max_bytes: int = Field(1 << 30, ge=1, description="A list of more bytes is refused: it is held in memory.")


class ForgetJobConfig(StrictModel):
    """Everything the forget job reads."""

    data: DatasetConfig = Field(..., description="The latents that they leave.")
    list: ForgetListConfig = Field(..., description="What is withdrawn.")
    unmatched: Literal["refuse", "keep"] = Field(
        "refuse",
        description="A list of which no name matches a stored row: refused, as a mistake, or kept for images that "
        "may still come.",
    )
    report: str | None = Field(None, description="Path or URI that receives what saw the rows, as JSON.")
    workers: int | None = Field(
        None,
        ge=1,
        description="Processes that look through rows; null: as many as the cluster at RAY_ADDRESS, or this machine "
        "without one, has CPUs.",
    )
    cluster: ClusterConfig = Field(ClusterConfig(), description="The Ray cluster, where RAY_ADDRESS names one.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="Where lineage is asked, and this recorded.")


class ExportOutputConfig(StrictModel):
    """Where the export goes."""

    uri: str = Field(..., min_length=1, description="Directory or fsspec URI that receives the export, and it alone.")


class ExportJobConfig(StrictModel):
    """Everything the export job reads."""

    data: DatasetConfig = Field(..., description="The latents or images to export; they are only read.")
    output: ExportOutputConfig = Field(..., description="Where the export goes.")
    format: Literal["parquet", "webdataset", "huggingface", "lance"] = Field(
        ...,
        description="parquet: plain files under data/; webdataset: tars of .npy or images, .json, .txt and .cls "
        "under data/; huggingface: a folder that datasets.load_dataset reads; lance: a Lance dataset in data.lance.",
    )
    shard_bytes: int = Field(
        256 << 20,
        ge=1 << 10,
        le=1 << 30,
        description="Bytes of a shard, about; what is written at a time, and what a crash costs.",
    )
    columns: tuple[str, ...] | None = Field(None, min_length=1, description="Columns to export; null: all.")
    dtype: Literal["float16", "float32"] | None = Field(
        None,
        description="What latents are written as; null: float16 where they are stored so, else float32. float16 of "
        "stored bfloat16 asks that every value stays finite.",
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="Shards written at a time, each with a CPU and two to three times its size in memory; null: as "
        "many as there are CPUs.",
    )
    cluster: ClusterConfig = Field(ClusterConfig(), description="The Ray cluster.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="Where the export is recorded.")
