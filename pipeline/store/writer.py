"""One write: a fragment of rows, its rejects, and the commit record that makes both visible."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.storage.root import Root
from pipeline.store.ledger import layout
from pipeline.store.ledger.identity import Identity
from pipeline.store.ledger.layout import removable
from pipeline.store.ledger.ledger import commit
from pipeline.store.ledger.record import CommitRecord, FileInfo
from pipeline.store.ledger.rowset import RowSet, address
from pipeline.store.read.row_groups import RowGroupInfo, RowGroups
from pipeline.store.schema import REJECTS, keyed_words, to_float32, usually_held_out

# -- Parquet data files: row groups of one bucket, page checksums, no statistics or dictionaries on blobs ------


ROW_BYTES = 256  # what is reckoned for a row beside its blob: captions and numbers, compressed
_BLOBS = ("latent", "image", "embedding", "pooled")
_ADDRESS = [("unit", "ascending"), ("row", "ascending"), ("variant", "ascending")]


def write_shard(
    root: Root,
    directory: str,
    rows: pa.Table,
    *,
    row_group_bytes: int,
    latent_dtype: str | None,
    meta: dict[str, str],
    generation: int,
    shuffle: int | None = None,
) -> FileInfo:
    """Put rows as one file and describe it; equal rows of a generation give one file, whatever order they come in.

    shuffle: the seed by which the rows of a bucket are mixed; None: they are in the order of their addresses. Raises
    what the store raises; the file is visible to nobody before a commit record names it.
    """
    if shuffle is None:
        rows = rows.sort_by([("bucket", "ascending"), *_ADDRESS])
    else:
        addresses = address(rows["unit"].to_numpy()) + rows["row"].to_numpy()
        places = keyed_words(addresses.astype(np.uint64), shuffle, rows["variant"].to_numpy().astype(np.uint64))
        rows = rows.append_column("place", pa.array(places))
        rows = rows.sort_by([("bucket", "ascending"), ("place", "ascending"), *_ADDRESS]).drop_columns("place")
    slices = list(_row_groups(rows, row_group_bytes))
    data = _encode(rows, slices, meta)
    info = FileInfo(
        path=removable(directory, data, generation),
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        rows=len(rows),
        row_groups=RowGroups.of([_describe(rows.slice(a, n), latent_dtype) for a, n in slices]),
    )
    root.put_if_absent(info.path, data)
    return info


def _encode(rows: pa.Table, slices: Sequence[tuple[int, int]], meta: dict[str, str]) -> bytes:
    blobs = [name for name in rows.column_names if name in _BLOBS]
    plain = [name for name in rows.column_names if name not in blobs]
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        rows.schema.with_metadata({k.encode(): v.encode() for k, v in meta.items()}),
        compression={name: "NONE" if name in blobs else "ZSTD" for name in rows.column_names},
        use_dictionary=[n for n in plain if pa.types.is_string(rows.schema.field(n).type)],
        write_statistics=[n for n in plain if not pa.types.is_nested(rows.schema.field(n).type)],
        write_page_checksum=True,
        store_schema=True,
    ) as writer:
        for start, count in slices:
            writer.write_table(rows.slice(start, count), row_group_size=count)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def _row_groups(rows: pa.Table, target_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, count) of single-bucket slices of at most about `target_bytes` each."""
    if not len(rows):
        return
    buckets = rows["bucket"].combine_chunks()
    runs = pc.run_end_encode(buckets)
    start = 0
    blob = next(name for name in _BLOBS if name in rows.column_names)
    for end in runs.run_ends.to_pylist():
        sizes = np.asarray(pc.binary_length(rows[blob].slice(start, end - start)).to_numpy(), np.int64) + ROW_BYTES
        reach = np.cumsum(sizes)
        done = 0
        while done < end - start:
            base = reach[done - 1] if done else 0
            count = max(1, int(np.searchsorted(reach, base + target_bytes, side="right")) - done)
            yield start + done, count
            done += count
        start = end


def _describe(rows: pa.Table, latent_dtype: str | None) -> RowGroupInfo:
    units = rows["unit"].to_numpy()
    blob = next(name for name in _BLOBS if name in rows.column_names)
    totals: dict[str, Any] = {}
    if latent_dtype is not None:
        totals = channel_totals(rows, latent_dtype)
    if "label" in rows.column_names:
        highest = pc.max(rows["label"]).as_py()
        totals |= {"label_max": -1 if highest is None else highest, "unlabelled": rows["label"].null_count}
    if latent_dtype is not None:
        totals |= {"held": usually_held_out(rows)}
    return RowGroupInfo(
        bucket=rows["bucket"][0].as_py(),
        rows=len(rows),
        size_bytes=int(pc.sum(pc.binary_length(rows[blob])).as_py()),
        first_unit=int(units.min()),
        last_unit=int(units.max()),
        **totals,
    )


def channel_totals(rows: pa.Table, latent_dtype: str) -> dict[str, Any]:
    """Per-channel sums over the stored values of rows of one latent shape, in float64."""
    channels, height, width = rows["latent_shape"][0].as_py()
    flat = np.concatenate([np.frombuffer(b.as_buffer(), np.uint8) for c in rows["latent"].chunks for b in c])
    values = to_float32(flat, latent_dtype).reshape(len(rows), channels, height * width)
    wide = values.astype(np.float64)
    return {
        "channel_sum": tuple(wide.sum(axis=(0, 2)).tolist()),
        "channel_sumsq": tuple(np.square(wide).sum(axis=(0, 2)).tolist()),
        "values": len(rows) * height * width,
    }


def write_rejects(root: Root, directory: str, rejects: pa.Table, generation: int) -> FileInfo | None:
    """Put reject rows as one file, or nothing when there are none."""
    if not len(rejects):
        return None
    rejects = rejects.sort_by([("unit", "ascending"), ("row", "ascending")])
    sink = pa.BufferOutputStream()
    pq.write_table(rejects, sink, compression="zstd", write_page_checksum=True)
    data = sink.getvalue().to_pybytes()
    path = removable(directory, data, generation)
    root.put_if_absent(path, data)
    return FileInfo(path, len(data), hashlib.sha256(data).hexdigest(), len(rejects))


@dataclass(frozen=True)
class Committer:
    """Commits rows under one generation; picklable, safe to call again with the same rows.

    shuffle: see `write_shard`.
    """

    root: Root
    generation: int
    row_group_bytes: int
    latent_dtype: str | None
    meta: Mapping[str, str]
    shuffle: int | None = None

    def commit(self, rows: pa.Table, outcomes: pa.Table | None, unit_rows: Mapping[int, int]) -> CommitRecord | None:
        """Make rows and outcomes (rejected and filtered rows) visible together.

        With a column `variants` (how many rows a source row has become), a source row counts as settled only when
        all of them are here; an incomplete one is left out, stays a gap, and is done again. A repeated row is kept
        once. Returns None when there is nothing to commit. Raises ValueError for a row that is stored and left out,
        ConflictError when a newer generation fences this one off, and what the store raises (outcome unknown:
        commit again).
        """
        rows = complete_rows(rows)
        outcomes = REJECTS.empty_table() if outcomes is None else outcomes
        stored = RowSet.from_rows(rows["unit"].to_numpy(), rows["row"].to_numpy())
        settled = RowSet.from_rows(outcomes["unit"].to_numpy(), outcomes["row"].to_numpy())
        if stored & settled:
            raise ValueError(f"rows are both stored and left out: {(stored & settled).triples()[:5]}")
        if not stored and not settled and not unit_rows:
            return None
        files: tuple[FileInfo, ...] = ()
        if len(rows):
            files = (
                write_shard(
                    self.root,
                    layout.DATA,
                    rows,
                    row_group_bytes=self.row_group_bytes,
                    latent_dtype=self.latent_dtype,
                    meta=dict(self.meta),
                    generation=self.generation,
                    shuffle=self.shuffle,
                ),
            )
        record = CommitRecord(
            generation=self.generation,
            covered=stored | settled,
            files=files,
            reject_file=write_rejects(self.root, layout.REJECTS, outcomes, self.generation),
            rejects=_by_reason(outcomes, "rejected"),
            filtered=_by_reason(outcomes, "filtered"),
            unit_rows=dict(unit_rows),
        )
        commit(self.root, record)
        return record


def file_meta(identity: Identity, generation: int) -> dict[str, str]:
    """What a data file says of itself, for readers that know Parquet alone: how its latents become tensors."""
    told = {"kind": identity.kind, "format_version": str(layout.FORMAT_VERSION), "generation": str(generation)}
    if identity.kind == "latents":
        codec = identity.about.get("codec", {})
        told |= {
            "latent_dtype": str(identity.fingerprint.get("latent_dtype")),
            "latent_layout": "C-order, little-endian, of the shape in latent_shape [c, h, w]; raw, not scaled or "
            "shifted: a model sees (latent - shift_factor) * scaling_factor",
            "posterior": str(identity.fingerprint.get("posterior")),
            **{name: str(codec[name]) for name in ("scaling_factor", "shift_factor") if name in codec},
        }
    return {f"latentloom.{name}": value for name, value in told.items()}


def complete_rows(rows: pa.Table) -> pa.Table:
    """Each (unit, row, variant) once, without the source rows whose `variants` are not all here."""
    if not len(rows):
        return rows.drop_columns(["variants"]) if "variants" in rows.column_names else rows
    address = (rows["unit"].to_numpy() << 32) + rows["row"].to_numpy()
    pairs = np.stack([address, rows["variant"].to_numpy().astype(np.int64)])
    _, first = np.unique(pairs, axis=1, return_index=True)
    if len(first) < len(rows):
        rows, address = rows.take(pa.array(np.sort(first))), address[np.sort(first)]
    if "variants" not in rows.column_names:
        return rows
    wanted = rows["variants"].to_numpy()
    if wanted.max() > 1:
        _, inverse, counts = np.unique(address, return_inverse=True, return_counts=True)
        rows = rows.filter(pa.array(counts[inverse] == wanted))
    return rows.drop_columns(["variants"])


def _by_reason(outcomes: pa.Table, outcome: str) -> dict[str, RowSet]:
    chosen = outcomes.filter(pc.equal(outcomes["outcome"], outcome))
    return {
        reason: RowSet.from_rows(part["unit"].to_numpy(), part["row"].to_numpy())
        for reason in sorted(set(chosen["reason"].to_pylist()))
        for part in [chosen.filter(pc.equal(chosen["reason"], reason))]
    }
