"""The read side: open a dataset once, then read row groups of visible rows from any thread."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from pipeline.config import StrictModel
from pipeline.errors import InputError
from pipeline.storage.errors import storage_errors, unreadable
from pipeline.storage.root import Root
from pipeline.storage.stores import RangedFile
from pipeline.store.ledger import layout
from pipeline.store.ledger.generation import at_one_generation, last_run
from pipeline.store.ledger.identity import Identity, identity_at, read_identity
from pipeline.store.ledger.record import FileInfo
from pipeline.store.ledger.rowset import RowSet, address
from pipeline.store.ledger.state import DataFile, State, VisibleFile, read_state, state_at
from pipeline.store.read.pins import Pins
from pipeline.store.read.row_groups import (
    Bytes,
    FixedRows,
    RowGroupInfo,
    fixed_width_pages,
    fixed_width_values,
    plain_span,
    reading_table,
)
from pipeline.store.writer import channel_totals

# -- The `data:` section of the jobs that read a dataset -------------------------------------------------------


class DatasetConfig(StrictModel):
    """The dataset a job reads."""

    uri: str = Field(..., min_length=1, description="Root of a dataset written by the encode or the sample job.")


# -- The row groups a reader sees, as columns: opening a dataset costs no object for each of a million of them -


Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowGroup:
    """One readable row group: its place, its bucket ("HxW" pixels) and its visible rows."""

    index: int
    file: str
    group: int
    bucket: str
    num_rows: int
    size_bytes: int


class ReadableGroups(Sequence[RowGroup]):
    """All row groups with a visible row, in order, as parallel arrays; an item is made when it is asked for.

    files: the visible files in order; file_of, number: which file and which of its groups; rows: visible ones;
    bucket_of: index into `buckets`; partial: some stored rows of the group are dead.
    """

    def __init__(self, files: Sequence[VisibleFile], count_visible: Callable[[VisibleFile, int], int]) -> None:
        self.files = tuple(files)
        sizes = [len(f.info.row_groups) for f in self.files]
        self.file_of: Ints = np.repeat(np.arange(len(sizes)), sizes)
        firsts = np.repeat(np.cumsum([0, *sizes])[:-1], sizes)
        self.number: Ints = np.arange(len(self.file_of)) - firsts
        whole = [f.info.row_groups for f in self.files]
        self.rows: Ints = _joined([g.rows for g in whole])
        self.size_bytes: Ints = _joined([g.size_bytes for g in whole])
        self.buckets = tuple(dict.fromkeys(bucket for g in whole for bucket in dict.fromkeys(g.buckets)))
        codes = {bucket: at for at, bucket in enumerate(self.buckets)}
        self.bucket_of: Ints = _joined([np.array([codes[b] for b in g.buckets], np.int64) for g in whole])
        # Of which row groups some unit has a dead row.
        touched = [
            touches(f.dead, f.info.row_groups.first_unit, f.info.row_groups.last_unit)
            if f.dead
            else np.zeros(len(f.info.row_groups), np.bool_)
            for f in self.files
        ]
        self.partial = np.concatenate([np.zeros(0, np.bool_), *touched])
        for at in np.flatnonzero(self.partial).tolist():
            self.rows[at] = count_visible(self.files[self.file_of[at]], int(self.number[at]))
        visible = self.rows > 0
        if not visible.all():
            for name in ("file_of", "number", "rows", "size_bytes", "bucket_of", "partial"):
                setattr(self, name, getattr(self, name)[visible])
            used, self.bucket_of = np.unique(self.bucket_of, return_inverse=True)
            self.buckets = tuple(self.buckets[at] for at in used.tolist())

    def place(self, index: int) -> tuple[VisibleFile, int]:
        """The file of a group and its number in it."""
        return self.files[self.file_of[index]], int(self.number[index])

    def info(self, index: int) -> RowGroupInfo:
        """What the ledger tells about a group."""
        file, number = self.place(index)
        return file.info.row_groups[number]

    def within(self, first_unit: int, stop_unit: int) -> Iterator[tuple[int, RowGroupInfo]]:
        """(index, info) of those that may hold rows of units [first_unit, stop_unit)."""
        hits = (self.stored("first_unit") < stop_unit) & (self.stored("last_unit") >= first_unit)
        return ((at, self.info(at)) for at in np.flatnonzero(hits).tolist())

    def stored(self, name: str) -> Ints:
        """One whole-number column of the ledger's, such as label_max, for the groups here: int64 [n]."""
        return self._all[name]

    @cached_property
    def _all(self) -> dict[str, Ints]:
        names = ("rows", "bytes", "first_unit", "last_unit", "values", "label_max", "unlabelled")
        whole = _joined([f.info.row_groups.whole for f in self.files], len(names))
        kept = whole[self._positions]
        return {name: kept[:, at] for at, name in enumerate(names)}

    @property
    def _positions(self) -> Ints:
        """Where each group lies among all groups of all files."""
        firsts = np.cumsum([0, *(len(f.info.row_groups) for f in self.files)])
        positions: Ints = firsts[self.file_of] + self.number
        return positions

    def channel_sums(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The ledger's sums and sums of squares of each group: float64 [n, channels]."""
        whole = [f.info.row_groups for f in self.files if len(f.info.row_groups)]
        if len({g.sums.shape[1] for g in whole}) > 1:
            raise InputError(
                "Files of one dataset hold latents of different numbers of channels",
                rule="all latents of a dataset have the channels of its codec",
                next_step="python -m jobs.verify shows all damage",
            )
        return (
            np.concatenate([g.sums for g in whole])[self._positions],
            np.concatenate([g.sumsqs for g in whole])[self._positions],
        )

    def __len__(self) -> int:
        return len(self.file_of)

    @overload
    def __getitem__(self, index: int) -> RowGroup: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[RowGroup, ...]: ...
    def __getitem__(self, index: int | slice) -> RowGroup | tuple[RowGroup, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        at = range(len(self))[index]
        return RowGroup(
            at,
            self.files[self.file_of[at]].info.path,
            int(self.number[at]),
            self.buckets[self.bucket_of[at]],
            int(self.rows[at]),
            int(self.size_bytes[at]),
        )


def _joined(parts: Sequence[Ints], width: int | None = None) -> Ints:
    empty: Ints = np.zeros(0 if width is None else (0, width), np.int64)
    return np.concatenate([empty, *parts])


def touches(rows: RowSet, first_unit: Ints, last_unit: Ints) -> npt.NDArray[np.bool_]:
    """Whether a set has a row in any of the units [first_unit, last_unit]: bool, elementwise."""
    begun = np.searchsorted(rows.starts, address(last_unit + 1), side="left")
    ended = np.searchsorted(rows.stops, address(first_unit), side="right")
    return np.asarray(begun > ended)


_WORTH_A_MAPPING = 1 << 20
_FOOTERS = 4096  # kept at a time; about 1.6 KB for each row group of a file


class Dataset:
    """A dataset of any kind as it was visible when opened, or when pinned; later commits do not change it."""

    def __init__(self, root: Root, identity: Identity, state: State) -> None:
        self.root, self.identity, self.state = root, identity, state
        self._footers: dict[str, pq.FileMetaData] = {}
        self._lock = threading.Lock()

        def count_visible(file: VisibleFile, number: int) -> int:
            return int(_alive(file, self._read_group(file.info, number, ["unit", "row"], True)).sum())

        self.row_groups = ReadableGroups(state.files, count_visible)
        self.num_rows = int(self.row_groups.rows.sum())

    @classmethod
    def open_kind(cls, uri: str, kind: str, key: str = "uri", pins: Pins | None = None) -> Any:
        """Open the dataset at `uri`; InputError when there is none or it holds rows of another kind.

        pins: where its state may be kept; what is visible now is taken when it is not.
        """
        root = Root(uri)
        identity = read_identity(root, key)
        if identity.kind != kind:
            raise InputError(
                f"{uri} is a dataset of {identity.kind}", key=key, value=uri, rule=f"a dataset of {kind} is needed"
            )
        kept = None if pins is None else pins.state(root)
        if kept is None and kind == "images":  # alone of all kinds they may have been given another identity
            kept, identity = at_one_generation(root, lambda n: (state_at(root, n), identity_at(root, n, key)))
        return cls(root, identity, read_state(root) if kept is None else kept)

    @property
    def uri(self) -> str:
        """Where the dataset lies."""
        return self.root.uri

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What all rows share: see DESIGN and FORMAT.md."""
        return self.identity.fingerprint

    @property
    def fingerprint_digest(self) -> str:
        """Hex digest of the fingerprint."""
        return self.identity.fingerprint_digest

    @cached_property
    def digest(self) -> str:
        """Hex digest of the logical content: the same rows made in the same way, however they are laid out."""
        state = self.state
        # By what parts hold, in the form of format version 1: not by the generation that its name tells, too.
        parts = [[f"{layout.PLAN_PARTS}/{layout.hash_in(p)}.parquet" for p in v.parts] for v in state.plan.versions]
        entries = [[*names, list(v.retired)] for names, v in zip(parts, state.plan.versions, strict=True)]
        body = [self.fingerprint_digest, entries, state.stored.triples()]
        return hashlib.blake2b(layout.canonical_json(body), digest_size=16).hexdigest()

    @cached_property
    def layout_digest(self) -> str:
        """Hex digest of the physical row groups in order: what the order of a stream depends on."""
        groups = self.row_groups
        body = [self.digest, [file.info.path for file in groups.files]]
        hasher = hashlib.blake2b(layout.canonical_json(body), digest_size=16)
        for column in (groups.file_of, groups.number, groups.rows):
            hasher.update(column.astype("<i8").tobytes())
        return hasher.hexdigest()

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """`run_id` (or handle) of the run that wrote what came last, and the `source` it read; {} when unknown."""
        written = [file.record.generation for file in (*self.state.files, *self.state.reject_files)]
        note = last_run(self.root, max(written, default=None))
        return {"run_id": note.get("run_id") or note.get("handle"), "source": note.get("source")} if note else {}

    def files(self) -> list[DataFile]:
        """The files with visible rows, in order, for readers that know Parquet alone."""
        rows = np.bincount(self.row_groups.file_of, self.row_groups.rows, len(self.row_groups.files)).astype(np.int64)
        files = zip(self.row_groups.files, rows.tolist(), strict=True)
        return [file.for_others(self.root.uri_of(file.info.path), count) for file, count in files if count]

    def groups_within(self, first_unit: int, stop_unit: int) -> Iterator[tuple[int, RowGroupInfo]]:
        """(index, info) of the readable row groups that may hold rows of units [first_unit, stop_unit)."""
        return self.row_groups.within(first_unit, stop_unit)

    def read(self, row_group: int, columns: Sequence[str] | None, *, verify: bool = True) -> pa.Table:
        """The visible rows of one row group, in (unit, row, variant) order; None reads all columns.

        verify: check the checksums of all pages read. InputError when the file is damaged or gone.
        Safe to call from several threads.
        """
        file, number = self.row_groups.place(row_group)
        if not self.row_groups.partial[row_group]:
            return self._read_group(file.info, number, columns, verify)
        extra = [] if columns is None else [c for c in ("unit", "row") if c not in columns]
        table = self._read_group(file.info, number, None if columns is None else [*columns, *extra], verify)
        table = table.filter(pa.array(_alive(file, table)))
        return table if columns is None else table.select(list(columns))

    def read_fixed(self, row_group: int, column: str, *, verify: bool = True) -> FixedRows:
        """The visible values of a binary column that all have one length, in order.

        Without `verify` they lie in the file itself where it is stored so (nothing is decoded, copied or checked;
        on a remote store one ranged read). ValueError when values are null or differ in length; else as `read`.
        """
        file, number = self.row_groups.place(row_group)
        span = None if verify else plain_span(self._footer(file.info), number, column)
        if span is None:
            return fixed_width_values(self.read(row_group, [column], verify=verify)[column])
        with reading_table(self.root.uri_of(file.info.path)):
            chunk = self._bytes(file.info.path, *span)
        values = fixed_width_pages(chunk, int(file.info.row_groups.rows[number]))
        if not self.row_groups.partial[row_group]:
            return values
        return values[_alive(file, self._read_group(file.info, number, ["unit", "row"], verify))]

    def _bytes(self, path: str, start: int, length: int) -> Bytes:
        local = self.root.local_path(path)
        if local is None:
            return np.frombuffer(self.root.read_range(path, start, length), np.uint8)
        # Ask the system to bring these bytes from the disk: whoever touches the mapping waits for every page.
        if hasattr(os, "posix_fadvise"):  # not on every system; it is advice alone
            handle = os.open(local, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, start, length, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)
        with pa.memory_map(str(local)) as source:
            source.seek(start)
            values = np.frombuffer(source.read_buffer(length), np.uint8)  # keeps the mapping alive
            # A process may have some 65,000 mappings: many small ones are not worth one each.
            return values if length >= _WORTH_A_MAPPING else values.copy()

    def _footer(self, file: FileInfo) -> pq.FileMetaData:
        footer = self._footers.get(file.path)
        if footer is None:
            with reading_table(self.root.uri_of(file.path)), self._opened(file) as source:
                if not isinstance(source, RangedFile) and source.size() != file.size_bytes:
                    raise ValueError(f"it has {source.size():,} bytes, committed were {file.size_bytes:,}")
                footer = pq.read_metadata(source)
                if footer.num_row_groups != len(file.row_groups):
                    raise ValueError(f"it has {footer.num_row_groups} row groups of {len(file.row_groups)}")
            with self._lock:
                self._footers[file.path] = footer
                while len(self._footers) > _FOOTERS:
                    self._footers.pop(next(iter(self._footers)))
        return footer

    def _opened(self, file: FileInfo) -> Any:
        """The file for pyarrow: mapped, or by ranged reads; nobody asks the store how long it is."""
        local = self.root.local_path(file.path)
        return pa.memory_map(str(local)) if local is not None else self.root.ranged(file.path, file.size_bytes)

    def _read_group(self, file: FileInfo, number: int, columns: Sequence[str] | None, verify: bool) -> pa.Table:
        footer = self._footer(file)
        with reading_table(self.root.uri_of(file.path)), self._opened(file) as source:
            remote = isinstance(source, RangedFile)
            reader = pq.ParquetFile(source, metadata=footer, pre_buffer=remote, page_checksum_verification=verify)
            names = None if columns is None else list(columns)
            table = reader.read_row_group(number, columns=names, use_threads=False)
            if names is not None and set(names) - set(table.column_names):
                raise ValueError(f"it has no column {min(set(names) - set(table.column_names))}")
            return table


class LatentDataset(Dataset):
    """A dataset of latents."""

    @classmethod
    def open(cls, uri: str, key: str = "uri", pins: Pins | None = None) -> LatentDataset:
        """Open the latents at `uri`; InputError, naming `key`, when there are none. pins: see `open_kind`."""
        dataset: LatentDataset = cls.open_kind(uri, "latents", key, pins)
        return dataset

    @property
    def codec(self) -> dict[str, Any]:
        """The encoder, as `CodecInfo.as_dict()` gave it."""
        return dict(self._told(self.identity.about, "codec"))

    @property
    def latent_dtype(self) -> str:
        """How latents are stored: float16 or bfloat16."""
        return str(self._told(self.fingerprint, "latent_dtype"))

    @property
    def posterior(self) -> str:
        """What a stored latent is: "mode", "sample" or "moments" (mean and log-variance, twice the channels)."""
        return str(self._told(self.fingerprint, "posterior"))

    def _told(self, section: dict[str, Any], name: str) -> Any:
        if name not in section:
            raise unreadable(self.root.uri_of(layout.IDENTITY), f"{name}: not told, as a dataset of latents does")
        return section[name]

    def has_any(self, column: str) -> bool:
        """Whether some row has a value in a column, by the files' statistics: rows since replaced count, too."""
        for file in self.state.files:
            footer = self._footer(file.info)
            for number in range(footer.num_row_groups):
                group = footer.row_group(number)
                leaves = (group.column(leaf) for leaf in range(group.num_columns))
                told = [leaf.statistics for leaf in leaves if leaf.path_in_schema.partition(".")[0] == column]
                if any(one is None or one.null_count < group.num_rows for one in told):
                    return True
        return False

    @cached_property
    def num_classes(self) -> int | None:
        """One more than the largest label; None when any row group holds a row without a label."""
        groups = self.row_groups
        if not len(groups) or groups.stored("unlabelled").any():
            return None
        return 1 + int(groups.stored("label_max").max())

    @cached_property
    def num_unlabelled(self) -> tuple[int, int]:
        """(rows without a label, rows) of the row groups as they are stored."""
        groups = self.row_groups
        return (int(groups.stored("unlabelled").sum()), int(groups.stored("rows").sum())) if len(groups) else (0, 0)

    @cached_property
    def _channel_moments(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        groups = self.row_groups
        if not len(groups):
            raise InputError(
                f"The dataset {self.uri} has no visible row: see {layout.LEDGER}/ and {layout.SNAPSHOTS}/",
                rule="statistics are those of stored rows",
                next_step="run jobs.encode to its end",
            )
        whole = ~groups.partial
        sums, squares = groups.channel_sums()
        total, square = sums[whole].sum(axis=0), squares[whole].sum(axis=0)
        values = int(groups.stored("values")[whole].sum())
        for index in np.flatnonzero(groups.partial).tolist():
            # Some stored rows do not count: their sums must not either.
            alive = channel_totals(self.read(index, ["latent", "latent_shape"]), self.latent_dtype)
            total, square = total + alive["channel_sum"], square + alive["channel_sumsq"]
            values += alive["values"]
        if values < 1 or not np.isfinite(square).all():
            raise InputError(
                f"The ledger of {self.uri} holds no sums of its latents",
                rule="every commit record tells the sums of the latents that it stores",
                next_step="python -m jobs.verify shows all damage",
            )
        mean = total / values
        return mean, np.sqrt(np.maximum(square / values - mean**2, 0.0))

    @property
    def channel_mean(self) -> npt.NDArray[np.float64]:
        """Exact mean of every stored channel over all visible rows, float64 [c]."""
        return self._channel_moments[0]

    @property
    def channel_std(self) -> npt.NDArray[np.float64]:
        """Exact standard deviation of every stored channel over all visible rows, float64 [c]."""
        return self._channel_moments[1]


def _alive(file: VisibleFile, rows: pa.Table) -> npt.NDArray[np.bool_]:
    """Which rows, given by unit and row, are visible."""
    return ~file.dead.contains(rows["unit"].to_numpy(), rows["row"].to_numpy())


# -- Blobs that rows keep outside their Parquet file: whole objects, or ranges of one, with the hash of their bytes
# A row that does names the place in `file`, "key" or "key#offset+length" relative to the root, and the sha256 of the
# bytes in `content_sha256`; its own blob is empty. Rows become visible after what they name was put, so a visible row
# always has its bytes. Garbage collection knows data/ and rejects/ only and leaves such objects alone.


COLUMNS = ("file", "content_sha256")
_RANGE = re.compile(r"^(?P<key>.+)#(?P<start>\d+)\+(?P<length>\d+)$")


def place_in(key: str, start: int, length: int) -> str:
    """The name of a range of an object."""
    return f"{key}#{start}+{length}"


def read_outside(root: Root, place: str) -> bytes:
    """The bytes that a row names; FileNotFoundError when they are gone."""
    span = _RANGE.match(place)
    if span is None:
        return root.read_bytes(place)
    return root.read_range(span["key"], int(span["start"]), int(span["length"]))


def problems_outside(root: Root, rows: pa.Table, *, read: bool) -> Iterator[tuple[str, str, str]]:
    """(kind, where, detail) of every named blob that is missing, short, or with `read` not of its hash.

    rows: a table with COLUMNS.
    """
    sizes: dict[str, int | None] = {}
    for place, digest in zip(*(rows[name].to_pylist() for name in COLUMNS), strict=True):
        if place is None:
            continue
        span = _RANGE.match(place)
        key, end = (place, 0) if span is None else (span["key"], int(span["start"]) + int(span["length"]))
        if key not in sizes:
            sizes[key] = root.info(key).size_bytes if root.exists(key) else None
        size = sizes[key]
        if size is None:
            yield "missing", place, "a row names this object and it is not there"
        elif size < end or size == 0:
            yield "size", place, f"{size:,} bytes there, the row's bytes end at {end:,}"
        elif read:
            try:
                data = read_outside(root, place)
            except storage_errors() as error:
                yield "unreadable", place, f"{type(error).__name__}: {error}"
                continue
            if hashlib.sha256(data).digest() != digest:
                yield "checksum", place, "its bytes are not those that were committed"
