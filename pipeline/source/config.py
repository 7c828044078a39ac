"""What to read (`SourceConfig`) and how an image becomes pixels (`ImageConfig`)."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, JsonValue, field_validator, model_validator

from pipeline.config import StrictModel
from pipeline.source.reading.filters import keeps, parse_filter

Format = Literal["jpeg", "png", "webp", "gif", "bmp", "tiff", "avif", "jpeg2000", "ppm", "heic", "jxl"]
FORMATS: tuple[Format, ...] = get_args(Format)
_USUAL = ("jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff", "jp2", "ppm")
IMAGE_ENDINGS = (*_USUAL, "heic", "heif", "jxl", "img", "image")
MAX_PIXELS = 178_956_970  # where Pillow itself refuses to open an image
Channel = Annotated[int, Field(ge=0, le=255)]
Side = Annotated[int, Field(ge=1, le=16_384)]


_PINNED = re.compile(r"hf://(?:datasets/|spaces/)?[^/@]+/[^/@]+@[0-9a-f]{40}(?:/|$)")


class _Source(StrictModel):
    uri: str = Field(
        ...,
        min_length=1,
        description="where the images are: a path or any fsspec URI, a hub's dataset pinned to a commit among them "
        "(hf://datasets/OWNER/NAME@COMMIT/FOLDER); tar and Parquet sources also take one file, a glob (*, ?, [..], "
        "**) or a brace pattern ({000..099})",
    )
    name: str = Field(
        "source",
        min_length=1,
        pattern=r"^[^\x00]+$",
        description="goes into every sample id; two sources with the same keys need different names",
    )
    caption: str | None = Field(
        "text",
        description="field or column holding the caption; null for none. Of a "
        "list of texts the first is the caption, and all of them are kept as extra.NAME (see data.captions).",
    )
    label: str | None = Field("label", description="field or column holding the integer label; null for none")
    classes: tuple[str, ...] = Field((), description="class names in label order: lets a label be given as its name")
    extra: tuple[str, ...] = Field((), description='further fields kept with each row as JSON; ["*"] keeps all')
    status: str | None = Field(
        "status",
        description="img2dataset's field or column: rows that say failed_to_download or failed_to_resize there are "
        "filtered, any other value means nothing; null for none",
    )
    max_bytes: int = Field(64 << 20, ge=1, description="an image of more bytes is rejected, unread where possible")
    read_ahead: int = Field(16, ge=1, le=256, description="objects fetched ahead of the decoder on remote stores")
    detect: Literal["version", "content"] = Field(
        "version",
        description="what shows that an object is another one: version is its size and its store's etag, on a disk "
        "its size and time of change; content reads and hashes, at each listing, every object without an etag",
    )
    filter: str | None = Field(
        None,
        description='rows to keep, by their metadata, e.g. "aesthetic > 5 and width >= 256"; others are filtered',
    )

    @field_validator("uri")
    @classmethod
    def _hub_is_pinned(cls, value: str) -> str:
        if value.startswith("hf://") and not _PINNED.match(value):
            raise ValueError(
                "a hub's dataset is pinned to a commit, as branches and tags move: hf://datasets/OWNER/NAME@COMMIT, "
                "its 40 digits being in the history of the dataset's files"
            )
        return value

    @field_validator("filter")
    @classmethod
    def _filter_parses(cls, value: str | None) -> str | None:
        if value is not None:
            parse_filter(value)
            keeps(value, {})  # literals of types that do not go together are found without any record
        return value

    @model_validator(mode="after")
    def _classes_are_distinct(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: every name may appear once")
        return self


class FolderSource(_Source):
    """Image files below a directory, with captions and labels beside them.

    In metadata.jsonl, .csv or .parquet files, or for each image in a file of its name: .txt, .caption or .json.
    """

    kind: Literal["folder"] = Field("folder", description="image files below a directory (ImageFolder)")
    label_from: Literal["metadata", "directory"] = Field(
        "metadata", description="labels from the metadata, or from the name of an image's directory (needs classes)"
    )
    exclude: tuple[str, ...] = Field((), description="glob patterns over keys of files that are no rows")
    strict: bool = Field(
        False,
        description="a metadata line that cannot be understood or names no file stops the listing; false: it rejects "
        "its row alone",
    )
    links: Literal["inside", "any"] = Field(
        "inside", description="links that are followed: to files below the source only, or any; others are rejected"
    )
    max_metadata_bytes: int = Field(
        1 << 30, ge=1, description="a metadata file of more bytes stops the listing: it is held in memory as a whole"
    )

    @model_validator(mode="after")
    def _directory_labels_need_classes(self) -> Self:
        if self.label_from == "directory" and not self.classes:
            raise ValueError("label_from: directory needs classes, the directory names in label order")
        return self


class ManifestSource(_Source):
    """Image objects below a place, as a manifest names them: nothing is listed.

    Caption, label and further fields are columns of the manifest.
    """

    kind: Literal["manifest"] = Field("manifest", description="image objects that a Parquet or CSV manifest names")
    manifest: str = Field(
        ...,
        min_length=1,
        description="path or URI of a .parquet, .csv or .csv.gz file, of a folder of these, or of the manifest.json "
        "of an S3 Inventory. Columns: key, relative to source.uri, or uri; size; etag or last_modified. Of an "
        "inventory's bucket what lies below source.uri is taken; objects with another ending than an image's are "
        "passed over",
    )
    links: Literal["inside", "any"] = Field(
        "inside", description="links that are followed: to files below the source only, or any; others are rejected"
    )


class InstalledSource(_Source):
    """A source that an installed package offers: its entry point in the group `latentloom.sources` makes it.

    The entry point is called with this configuration; what it returns is a
    `pipeline.source.reading.listing.ReadableSource`.
    """

    kind: Literal["installed"] = Field("installed", description="a source that an installed package offers")
    plugin: str = Field(..., min_length=1, description="its entry point in the group latentloom.sources")
    options: dict[str, JsonValue] = Field({}, description="further settings for it, as that package describes them")


class WebDatasetSource(_Source):
    """Tar shards whose members share a basename per sample (.jpg + .txt/.json/.cls)."""

    kind: Literal["webdataset"] = Field("webdataset", description="tar shards, read in order, never unpacked")
    images: tuple[str, ...] = Field(
        IMAGE_ENDINGS,
        min_length=1,
        description="member extensions that hold the image; the first one present is taken",
    )


class TableConfig(StrictModel):
    """A table whose own log says which Parquet files it is: nothing is listed, and old snapshots are read as well."""

    format: Literal["delta", "iceberg"] = Field(
        ..., description="Delta Lake or Apache Iceberg (extras of these names)"
    )
    version: int | None = Field(None, ge=0, description="Delta's version or Iceberg's snapshot id; null: the newest")
    catalog: str | None = Field(
        None,
        description="Iceberg: a catalog of pyiceberg's own configuration, with `name`; null: none is asked",
    )
    name: str | None = Field(None, description="Iceberg: the table's name in its catalog, namespace included")
    metadata: str | None = Field(
        None,
        description="Iceberg without a catalog: the metadata.json that is read; null: that of the highest number "
        "below uri/metadata",
    )

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        if (self.catalog is None) != (self.name is None):
            raise ValueError("catalog and name belong together")
        if self.format == "delta" and (self.catalog or self.metadata):
            raise ValueError("catalog, name and metadata are Iceberg's: a Delta table is found by its uri")
        return self


class ParquetSource(_Source):
    """Parquet files with image bytes, the {bytes, path} struct of Hugging Face datasets, or URIs of images."""

    kind: Literal["parquet"] = Field("parquet", description="Parquet files holding images or their URIs")
    table: TableConfig | None = Field(
        None,
        description="uri is a table of Delta Lake or Iceberg, and its files are read; null: all that lie there",
    )
    image: str = Field("image", description="column with the image: binary, {bytes, path} struct, or string URI")
    uri_prefixes: tuple[str, ...] = Field(
        (), description="absolute image URIs are read only below these; relative ones below the source itself"
    )
    exif: str | None = Field("exif", description="column with EXIF as JSON where it exists (img2dataset)")
    isolate: bool = Field(
        True,
        description="parse the files in a child process with limits on memory and CPU; false for files you trust",
    )
    memory_mb: int = Field(
        4096,
        ge=512,
        description="address space of that child, MiB: a page of a file must fit, as stored and unpacked",
    )


SourceConfig = Annotated[
    FolderSource | ManifestSource | WebDatasetSource | ParquetSource | InstalledSource, Field(discriminator="kind")
]


class SquareBuckets(StrictModel):
    """One square per resolution."""

    kind: Literal["square"] = Field("square", description="every image becomes resolution x resolution")


class BudgetBuckets(StrictModel):
    """Every (height, width) on a grid that spends about resolution squared pixels (SDXL)."""

    kind: Literal["budget"] = Field("budget", description="aspect-ratio buckets of about resolution^2 pixels each")
    step: int | None = Field(
        None, ge=1, description="grid of the sides in pixels; default resolution/16 rounded to image.multiple_of"
    )
    max_aspect: float = Field(2.0, ge=1.0, le=16.0, description="no bucket is longer than this times its short side")


class TableBuckets(StrictModel):
    """An explicit list of sizes."""

    kind: Literal["table"] = Field("table", description="aspect-ratio buckets listed one by one")
    sizes: tuple[tuple[Side, Side], ...] = Field(..., min_length=1, description="(height, width) of each bucket")


BucketConfig = Annotated[SquareBuckets | BudgetBuckets | TableBuckets, Field(discriminator="kind")]


class ImageConfig(StrictModel):
    """From the bytes of an image to uint8 RGB of a bucket's size."""

    resolution: Side | tuple[Side, ...] = Field(
        512, description="side in pixels; several give one row per image and resolution, from one decode"
    )
    buckets: BucketConfig = Field(SquareBuckets(), description="the sizes images are brought to")
    multiple_of: int = Field(8, ge=1, description="every side is a multiple of this: the codec's factor")
    crop: Literal["center", "random"] = Field(
        "center", description="where the crop lies; random is keyed by the sample id, so it never changes"
    )
    flip: bool = Field(False, description="add a horizontally flipped variant of every row")
    min_side: int = Field(1, ge=1, description="images with a shorter short side are filtered")
    max_upscale: float = Field(2.0, gt=0, description="images that would be enlarged by more are filtered")
    max_aspect: float = Field(10.0, ge=1.0, description="images longer than this times their short side are rejected")
    max_pixels: int = Field(100_000_000, ge=1, le=MAX_PIXELS, description="larger images are rejected undecoded")
    formats: tuple[Format, ...] = Field(
        FORMATS, min_length=1, description="formats to decode, told by magic bytes; heic and jxl need extras so named"
    )
    matte: tuple[Channel, Channel, Channel] = Field(
        (255, 255, 255), description="sRGB colour behind transparent pixels"
    )
    draft: bool = Field(True, description="let libjpeg scale large JPEGs down while decoding (several times faster)")
    isolate: Literal["risky", "all", "never"] = Field(
        "risky",
        description="which images to decode in a killable child process: those of slow decoders, all or none",
    )
    decode_cpu_s: float = Field(20.0, gt=0, description="CPU seconds a child may spend on one image")
    decode_memory_mb: int = Field(3072, ge=256, description="address space of a child process, MiB")
    phash: bool = Field(False, description="store a 64-bit perceptual hash with each row")

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The resolutions in variant order."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution,)

    @model_validator(mode="after")
    def _sizes_fit_the_codec(self) -> Self:
        if not self.resolutions or len(set(self.resolutions)) != len(self.resolutions):
            raise ValueError("resolution: give at least one, each once")
        sides = set(self.resolutions)
        if isinstance(self.buckets, TableBuckets):
            sides = {side for size in self.buckets.sizes for side in size}
            if len(self.resolutions) > 1:
                raise ValueError("buckets: a table fixes the sizes, so only one resolution can be given")
        for side in sorted(sides):
            if side % self.multiple_of:
                raise ValueError(f"every side must be a multiple of multiple_of = {self.multiple_of}; {side} is not")
        step = self.buckets.step if isinstance(self.buckets, BudgetBuckets) else None
        if step is not None and (step % self.multiple_of or step > min(self.resolutions)):
            raise ValueError(
                f"buckets.step = {step} must be a multiple of multiple_of = {self.multiple_of} "
                f"and at most the smallest resolution"
            )
        return self
