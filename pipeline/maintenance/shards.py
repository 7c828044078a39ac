"""What an export is made of: rows become those of its format, row groups become shards, a shard becomes an object.

Rows stay in the order in which they are read. The same rows and settings give the same bytes, wherever and whenever
they are made: that is what makes an export resumable.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.storage.root import Root
from pipeline.store.ledger.identity import Identity
from pipeline.store.read.dataset import Dataset, read_outside
from pipeline.store.read.row_groups import ReadableGroups, reading_table
from pipeline.store.schema import latents_from
from pipeline.store.writer import ROW_BYTES

LANCE = "data.lance"
BLOBS = {"latents": "latent", "images": "image"}  # the kinds that are exported, and the column of each
_TAR_ROW_BYTES = 4 << 10  # a header for each of its members, each filled up to blocks of 512 bytes
_PIXEL_BYTES = 2  # of an image outside its row, whose size the ledger does not know: a generous PNG


# -- What a row becomes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """What the rows of an export become, the same in every shard.

    stored: the exported columns as the dataset has them. stored_dtype, dtype: of latents, there and here. shape: of
    all latents, None where they differ. meta: what a file tells of itself.
    """

    format: str
    kind: str
    stored: pa.Schema
    stored_dtype: str | None
    dtype: str | None
    shape: tuple[int, int, int] | None
    meta: Mapping[str, str]

    @property
    def blob(self) -> str | None:
        """The exported column that holds latents or images."""
        return BLOBS[self.kind] if BLOBS[self.kind] in self.stored.names else None

    def needed(self) -> list[str]:
        """The columns to be read."""
        beside = {"latent": ["key", "latent_shape"], "image": ["file", "content_sha256", "media_type"], None: []}
        ids = ["sample_id"] if self.format == "webdataset" else []
        return list(dict.fromkeys([*self.stored.names, *beside[self.blob], *ids]))

    def schema(self) -> pa.Schema:
        """The columns of a table of the export; metadata of fields and of the whole are what `datasets` knows."""
        typed, fields, features = self.format == "huggingface", [], {}
        for field in self.stored:
            name, kind, meta = field.name, field.type, None
            if name == "latent" and self.shape is None:
                kind = pa.list_(self._value)
            elif name == "latent" and typed:
                kind = pa.list_(pa.list_(pa.list_(self._value)))
                shape = list(self.shape or ())
                features[name] = {"shape": shape, "dtype": self.dtype, "_type": "Array3D"}
                extension = "datasets.features.features.Array3DExtensionType"
                meta = {
                    "ARROW:extension:name": extension,
                    "ARROW:extension:metadata": json.dumps([shape, self.dtype]),
                }
            elif name == "latent":
                kind = pa.list_(self._value, math.prod(self.shape or ()))
            elif name == "image" and typed:
                kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
                features[name] = {"_type": "Image"}
            elif typed and pa.types.is_fixed_size_binary(kind):  # of which it has none
                kind = pa.binary()
            fields.append(pa.field(name, kind, metadata=meta))
        known = {"huggingface": json.dumps({"info": {"features": features}})} if features else {}
        return pa.schema(fields, {**self.meta, **known})

    @property
    def _value(self) -> pa.DataType:
        return pa.float16() if self.dtype == "float16" else pa.float32()

    def table(self, root: Root, rows: pa.Table) -> pa.Table:
        """Rows as they are read, in the columns of `schema`."""
        schema, columns = self.schema(), []
        for field in schema:
            if field.name == "latent":
                columns.append(self._nested(self.latents(rows)))
            elif field.name == "image":
                images = pa.array(self.images(root, rows), pa.large_binary())
                if pa.types.is_struct(field.type):
                    paths = pa.nulls(len(rows), pa.string())
                    images = pa.StructArray.from_arrays([images.cast(pa.binary()), paths], fields=list(field.type))
                columns.append(images)
            else:
                columns.append(rows[field.name].cast(field.type))
        return pa.Table.from_arrays(columns, schema=schema)

    def latents(self, rows: pa.Table) -> npt.NDArray[Any]:
        """Raw latents as they are written: [n, c, h, w]; InputError where a value does not fit."""
        assert self.stored_dtype is not None
        values = latents_from(rows["latent"], tuple(rows["latent_shape"][0].as_py()), self.stored_dtype)
        if self.dtype == "float32":
            return values
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        fitting = np.isfinite(halves).reshape(len(halves), -1).all(axis=1)
        if self.stored_dtype != "float16" and not fitting.all():
            at = int(np.argmin(fitting))
            raise InputError(
                f"The latent of {rows['key'][at].as_py()!r:.200} reaches {np.abs(values[at]).max():.3g}, which "
                "float16 cannot hold",
                key="dtype",
                value=self.dtype,
                rule="every value that is exported is finite; float16 ends at 65,504",
                next_step="export it with dtype=float32 into another output",
            )
        return halves

    def _nested(self, latents: npt.NDArray[Any]) -> pa.Array:
        flat = pa.array(latents.reshape(-1))
        if self.shape is not None and self.format != "huggingface":
            return pa.FixedSizeListArray.from_arrays(flat, math.prod(self.shape))
        for side in reversed(self.shape or (latents[0].size,)):
            flat = pa.ListArray.from_arrays(pa.array(np.arange(0, len(flat) + 1, side, dtype=np.int32)), flat)
        return flat

    def images(self, root: Root, rows: pa.Table) -> Iterator[bytes]:
        """The bytes of each image, wherever they lie; InputError when they are gone or not those of the row."""
        for image, place, digest in zip(
            *(rows[name].to_pylist() for name in ("image", "file", "content_sha256")), strict=True
        ):
            if place is None:
                yield image
                continue
            with reading_table(f"{root.uri}/{place}"):
                data = read_outside(root, place)
                if hashlib.sha256(data).digest() != digest:
                    raise ValueError("its bytes are not those that were committed")
            yield data

    def members(self, root: Root, rows: pa.Table) -> Iterator[tuple[str, bytes]]:
        """The members of a tar, by WebDataset's conventions: those of a sample have one name before the dot."""
        blobs: Iterable[Any] = [None] * len(rows)
        if self.blob is not None:
            blobs = self.latents(rows) if self.kind == "latents" else self.images(root, rows)
        endings = [kind.partition("/")[2] for kind in rows["media_type"].to_pylist()] if self.blob == "image" else []
        others = rows.select([name for name in self.stored.names if name != self.blob]).to_pylist()
        for at, (identity, blob, row) in enumerate(zip(rows["sample_id"].to_pylist(), blobs, others, strict=True)):
            name, label = identity.hex(), row.pop("label", None)
            text = row.pop("prompt" if self.kind == "images" else "caption", None)
            if self.blob == "latent":
                packed = io.BytesIO()
                np.save(packed, blob)
                yield f"{name}.npy", packed.getvalue()
            elif self.blob == "image":
                yield f"{name}.{endings[at]}", blob
            if text is not None:
                yield f"{name}.txt", text.encode()
            if label is not None:
                yield f"{name}.cls", str(label).encode()
            yield f"{name}.json", json.dumps(row, default=bytes.hex, ensure_ascii=False).encode()


# -- Row groups to shards ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowSpan:
    """Visible rows [start, stop) of a row group."""

    group: int
    start: int
    stop: int


def row_bytes(dataset: Dataset, form: Form) -> npt.NDArray[np.float64]:
    """About what a row of each row group takes in a shard: float64 [n]."""
    groups, beside = dataset.row_groups, float(_TAR_ROW_BYTES if form.format == "webdataset" else ROW_BYTES)
    if form.blob is None:
        return np.full(len(groups), beside)
    sizes = groups.size_bytes / np.maximum(groups.stored("rows"), 1)
    if form.blob == "latent":
        return sizes * (2 if form.dtype == "float32" else 1) + beside
    pixels = np.array([math.prod(map(int, bucket.split("x"))) for bucket in groups.buckets])[groups.bucket_of]
    return np.where(sizes > 0, sizes, _PIXEL_BYTES * pixels) + beside


def cut(rows: npt.NDArray[np.int64], row_bytes: npt.NDArray[np.float64], shard_bytes: int) -> list[list[RowSpan]]:
    """Row groups as shards of at most about `shard_bytes`, in order; one that is larger by itself is cut evenly."""
    shards: list[list[RowSpan]] = [[]]
    filled = 0.0
    for group, (count, size) in enumerate(zip(rows.tolist(), row_bytes.tolist(), strict=True)):
        parts = min(count, math.ceil(count * size / shard_bytes))
        for start, stop in pairwise(count * part // parts for part in range(parts + 1)):
            if shards[-1] and filled + (stop - start) * size > shard_bytes:
                shards.append([])
                filled = 0.0
            shards[-1].append(RowSpan(group, start, stop))
            filled += (stop - start) * size
    return shards


# -- A shard, on a worker --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardWriter:
    """Writes one shard, whole, under its name; picklable. groups: Ray's reference to the dataset's row groups.

    A task that is repeated, or a run beside this one, makes the same bytes: the first stay.
    """

    data: Root
    identity: Identity
    groups: Any
    form: Form
    output: Root
    monitor: Any

    def write(self, name: str, number: int, spans: Sequence[RowSpan]) -> Iterator[pa.Table]:
        """Write it; one row comes back, with its number."""
        import ray

        from pipeline.dataflow.monitor import Amounts

        groups = ReadableGroups.from_arrow(ray.get(self.groups))
        dataset = Dataset(self.data, self.identity, _not_asked, groups)
        amounts = Amounts(self.monitor.add.remote)

        def parts() -> Iterator[pa.Table]:
            for span in spans:
                rows = dataset.read(span.group, self.form.needed())
                yield rows.slice(span.start, span.stop - span.start)
                amounts.add({"rows": span.stop - span.start})

        for key, content in _ENCODED[self.form.format](self.form, self.data, parts(), name):
            self.output.put_if_absent(key, content)
        amounts.flush()
        yield pa.table({"shard": [number]})


def _not_asked() -> Any:
    raise AssertionError("a worker reads what its driver has opened")


Objects = Iterator[tuple[str, bytes]]  # the last is the shard's own


def _parquet(form: Form, root: Root, parts: Iterator[pa.Table], name: str) -> Objects:
    sink, schema = io.BytesIO(), form.schema()
    repeating = [field.name for field in schema if pa.types.is_string(field.type)]
    with pq.ParquetWriter(
        sink, schema, compression="zstd", use_dictionary=repeating, write_page_checksum=True
    ) as writer:
        for rows in parts:
            writer.write_table(form.table(root, rows))
    yield name, sink.getvalue()


def _tar(form: Form, root: Root, parts: Iterator[pa.Table], name: str) -> Objects:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for rows in parts:
            for member, content in form.members(root, rows):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    yield name, sink.getvalue()


def _fragment(form: Form, root: Root, parts: Iterator[pa.Table], name: str) -> Objects:
    """A file of Lance's, made on this machine's disk, and what a commit must know of it, under names of our own."""
    from lance.fragment import write_fragments

    # What a table tells of itself Lance writes in an order of chance; the version that is committed has it, too.
    table = pa.concat_tables(form.table(root, rows) for rows in parts).replace_schema_metadata(None)
    with tempfile.TemporaryDirectory(prefix="latentloom-lance-") as folder:
        (fragment,) = write_fragments(table, folder, mode="create", max_rows_per_file=len(table))
        told = fragment.to_json()
        (file,) = told["files"]
        content = Path(folder, "data", file["path"]).read_bytes()
    file["path"] = f"{Path(name).stem}.lance"
    file["file_size_bytes"] = None  # the commit asks: another release's file may be there already
    yield f"{LANCE}/data/{file['path']}", content
    yield name, json.dumps(told).encode()


_ENCODED: dict[str, Callable[[Form, Root, Iterator[pa.Table], str], Objects]] = {
    "parquet": _parquet,
    "webdataset": _tar,
    "huggingface": _parquet,
    "lance": _fragment,
}
