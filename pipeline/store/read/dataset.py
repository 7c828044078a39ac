"""The read side: open a dataset once, then read row groups of visible rows from any thread."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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
from pipeline.store.ledger.generation import IN_UNITS, arrangement, at_one_generation, last_recipe, last_run
from pipeline.store.ledger.identity import Identity, identity_at, read_identity
from pipeline.store.ledger.rowset import RowSet, address, distinct
from pipeline.store.ledger.state import State, read_state, state_at
from pipeline.store.read.pages import Bytes, FixedRows, fixed_width_pages, fixed_width_values, plain_span
from pipeline.store.read.pins import Pins
from pipeline.store.read.row_groups import ReadableGroups, RowGroupInfo, reading_table
from pipeline.store.writer import channel_totals

# -- The `data:` section of the jobs that read a dataset -------------------------------------------------------


class DatasetConfig(StrictModel):
    """The dataset a job reads."""

    uri: str = Field(..., min_length=1, description="Root of a dataset written by the encode or the sample job.")


@dataclass(frozen=True)
class DataFile:
    """A file with visible rows for other readers: where it lies, how many they are, and which.

    row_filter: SQL over the columns unit and row that is true for the visible rows; None where all are.
    """

    uri: str
    num_rows: int
    size_bytes: int
    row_filter: str | None


_WORTH_A_MAPPING = 1 << 20
_SPREAD = 1 << 20  # intervals of rows
_READERS = 8
_FOOTERS = 4096  # kept at a time; about 1.6 KB for each row group of a file


class Dataset:
    """A dataset of any kind as it was visible when opened, or when pinned; later commits do not change it."""

    def __init__(
        self,
        root: Root,
        identity: Identity,
        state: State | Callable[[], State],
        published: tuple[ReadableGroups, dict[str, str]] | None = None,
    ) -> None:
        """published: its row groups and `facts`, as somebody who opened this state has published them."""
        self.root, self.identity, self._state = root, identity, state
        self._footers: dict[str, pq.FileMetaData] = {}
        self._lock = threading.Lock()
        # Of a state that was pinned: rows that were withdrawn since. They are there still, and are not to be served.
        self.withdrawn = RowSet.empty()
        self._published = published[1] if published else {}
        self.row_groups = published[0] if published else self.state.files.readable()
        if not published:
            partial = np.flatnonzero(self.row_groups.partial).tolist()
            with ThreadPoolExecutor(_READERS) as pool:
                alive = pool.map(lambda at: int(self.alive(at).sum()), partial)
                self.row_groups.keep(dict(zip(partial, alive, strict=True)))
        self.num_rows = int(self.row_groups.rows.sum())

    def __reduce__(self) -> tuple[Any, ...]:
        # For processes that read: the row groups, a buffer that pickle's protocol 5 moves as it is, and no ledger.
        return received, (type(self), self.root, self.identity, self.row_groups.to_arrow({}))

    @cached_property
    def state(self) -> State:
        """Everything that the ledger tells; of a published dataset it is read when it is asked for."""
        return self._state() if callable(self._state) else self._state

    def publish(self, pins: Pins) -> None:
        """Leave what readers need beside what is pinned, so that none of them folds the ledger for itself."""
        pins.publish(self.root, self.row_groups, self._facts)

    def _facts(self) -> dict[str, str]:
        told = {"digest": self.digest, "layout_digest": self.layout_digest, "fingerprint": self.fingerprint_digest}
        return {**told, "shuffled": json.dumps(self.is_shuffled)}

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
        published = None if pins is None else pins.published(root)
        if pins is not None and published and published[1].get("fingerprint") == identity.fingerprint_digest:
            dataset = cls(root, identity, lambda: pins.state(root) or read_state(root), published)
            dataset.withdrawn = pins.withdrawn(root)
            return dataset
        kept = None if pins is None else pins.state(root)
        if kept is None and kind == "images":  # alone of all kinds they may have been given another identity
            kept, identity = at_one_generation(root, lambda n: (state_at(root, n), identity_at(root, n, key)))
        dataset = cls(root, identity, read_state(root) if kept is None else kept)
        if pins is not None and kept is not None:
            dataset.withdrawn = pins.withdrawn(root)
        return dataset

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
        if "digest" in self._published:
            return self._published["digest"]
        state = self.state
        # By what parts hold, in the form of format version 1: not by the generation that its name tells, too.
        parts = [[f"{layout.PLAN_PARTS}/{layout.hash_in(p)}.parquet" for p in v.parts] for v in state.plan.versions]
        entries = [[*names, list(v.retired)] for names, v in zip(parts, state.plan.versions, strict=True)]
        stored = state.stored
        spread = stored.num_spans() > _SPREAD
        body = [self.fingerprint_digest, entries, [] if spread else stored.triples()]
        hasher = hashlib.blake2b(layout.canonical_json(body), digest_size=16)
        if spread:  # as text they would take minutes
            for spans in stored.spans():
                hasher.update(np.stack(spans, axis=1).astype("<i8").tobytes())
        return hasher.hexdigest()

    @cached_property
    def layout_digest(self) -> str:
        """Hex digest of the physical row groups in order: what the order of a stream depends on."""
        if "layout_digest" in self._published:
            return self._published["layout_digest"]
        groups = self.row_groups
        body = [self.digest, groups.paths.to_pylist()]
        hasher = hashlib.blake2b(layout.canonical_json(body), digest_size=16)
        for column in (groups.file_of, groups.number, groups.rows):
            hasher.update(column.astype("<i8").tobytes())
        return hasher.hexdigest()

    @cached_property
    def is_shuffled(self) -> bool:
        """Whether shuffled compactions wrote all its files."""
        if "shuffled" in self._published:
            return bool(json.loads(self._published["shuffled"]))
        generations = distinct(self.state.files.generations).tolist()
        with ThreadPoolExecutor(_READERS) as pool:  # after a year of nights they are hundreds
            found = pool.map(lambda number: arrangement(self.root, number), generations)
            return all(each != IN_UNITS for each in found)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """`run_id` (or handle) of the run that wrote what came last, and the `source` it read; {} when unknown."""
        written = np.concatenate([self.state.files.generations, self.state.reject_files.generations])
        note = last_run(self.root, int(written.max()) if len(written) else None)
        return {"run_id": note.get("run_id") or note.get("handle"), "source": note.get("source")} if note else {}

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ...: of latents as the source told them last, of images as their model; or ()."""
        told = self.identity.about.get("classes") or last_recipe(self.root).get("source", {}).get("classes", ())
        return tuple(told)

    def bucket_counts(self) -> list[tuple[int, str]]:
        """(visible rows, bucket) of each, by the ledger alone, the largest first."""
        groups = self.row_groups
        rows = np.bincount(groups.bucket_of, groups.rows, len(groups.buckets)).astype(np.int64).tolist()
        return sorted(zip(rows, groups.buckets, strict=True), reverse=True)

    def files(self) -> list[DataFile]:
        """The files with visible rows, in order, for readers that know Parquet alone."""
        groups = self.row_groups
        rows = np.bincount(groups.file_of, groups.rows, len(groups.paths)).astype(np.int64).tolist()
        return [
            DataFile(
                self.root.uri_of(path),
                rows[at],
                int(groups.file_bytes[at]),
                f"NOT ({groups.dead[at].sql()})" if at in groups.dead else None,
            )
            for at, path in enumerate(groups.paths.to_pylist())
            if rows[at]
        ]

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
            return self._read_group(file, number, columns, verify)
        extra = [] if columns is None else [c for c in ("unit", "row") if c not in columns]
        table = self._read_group(file, number, None if columns is None else [*columns, *extra], verify)
        table = table.filter(pa.array(self.alive(row_group, table)))
        return table if columns is None else table.select(list(columns))

    def read_fixed(self, row_group: int, column: str, *, verify: bool = True) -> FixedRows:
        """The visible values of a binary column that all have one length, in order.

        Without `verify` they lie in the file itself where it is stored so (nothing is decoded, copied or checked;
        on a remote store one ranged read). ValueError when values are null or differ in length; else as `read`.
        """
        file, number = self.row_groups.place(row_group)
        span = None if verify else plain_span(self.footer(file), number, column)
        if span is None:
            return fixed_width_values(self.read(row_group, [column], verify=verify)[column])
        path = self.row_groups.path(file)
        with reading_table(self.root.uri_of(path)):
            chunk = self._bytes(path, span.start, span.size_bytes)
        rows = int(self.row_groups.stored("rows")[row_group])
        values = fixed_width_pages(chunk, rows, optional=span.optional)
        return values[self.alive(row_group)] if self.row_groups.partial[row_group] else values

    def withdrawn_in(self, row_group: int) -> npt.NDArray[np.bool_] | None:
        """Which visible rows of a row group were withdrawn since they were pinned; None where none was."""
        info = self.row_groups.info(row_group)
        near = (
            self.withdrawn.within(address(info.first_unit), address(info.last_unit + 1)) if self.withdrawn else None
        )
        if not near:
            return None
        rows = self.read(row_group, ["unit", "row"])
        gone = near.contains(rows["unit"].to_numpy(), rows["row"].to_numpy())
        return gone if gone.any() else None

    def alive(self, row_group: int, rows: pa.Table | None = None) -> npt.NDArray[np.bool_]:
        """Which stored rows of a row group, given with unit and row or read here, are visible."""
        file, number = self.row_groups.place(row_group)
        rows = self._read_group(file, number, ["unit", "row"], True) if rows is None else rows
        return ~self.row_groups.dead[file].contains(rows["unit"].to_numpy(), rows["row"].to_numpy())

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

    def footer(self, file: int) -> pq.FileMetaData:
        """The footer of a file, given by its number among the visible ones; InputError as `read`."""
        groups = self.row_groups
        path, size, number = groups.path(file), int(groups.file_bytes[file]), int(groups.file_groups[file])
        footer = self._footers.get(path)
        if footer is None:
            with reading_table(self.root.uri_of(path)), self._opened(file) as source:
                if not isinstance(source, RangedFile) and source.size() != size:
                    raise ValueError(f"it has {source.size():,} bytes, committed were {size:,}")
                footer = pq.read_metadata(source)
                if footer.num_row_groups != number:
                    raise ValueError(f"it has {footer.num_row_groups} row groups of {number}")
            with self._lock:
                self._footers[path] = footer
                while len(self._footers) > _FOOTERS:
                    self._footers.pop(next(iter(self._footers)))
        return footer

    def _opened(self, file: int) -> Any:
        """The file for pyarrow: mapped, or by ranged reads; nobody asks the store how long it is."""
        path, size = self.row_groups.path(file), int(self.row_groups.file_bytes[file])
        local = self.root.local_path(path)
        return pa.memory_map(str(local)) if local is not None else self.root.ranged(path, size)

    def _read_group(self, file: int, number: int, columns: Sequence[str] | None, verify: bool) -> pa.Table:
        footer = self.footer(file)
        with reading_table(self.root.uri_of(self.row_groups.path(file))), self._opened(file) as source:
            remote = isinstance(source, RangedFile)
            reader = pq.ParquetFile(source, metadata=footer, pre_buffer=remote, page_checksum_verification=verify)
            names = None if columns is None else list(columns)
            table = reader.read_row_group(number, columns=names, use_threads=False)
            if names is not None and set(names) - set(table.column_names):
                raise ValueError(f"it has no column {min(set(names) - set(table.column_names))}")
            return table


def received(kind: type[Dataset], root: Root, identity: Identity, groups: pa.Buffer) -> Dataset:
    """A dataset that another process has opened."""

    def state() -> State:
        raise AssertionError("who was sent a dataset reads rows, and leaves its ledger to who has opened it")

    return kind(root, identity, state, ReadableGroups.from_arrow(groups))


class LatentDataset(Dataset):
    """A dataset of latents."""

    @classmethod
    def open(cls, uri: str, key: str = "uri", pins: Pins | None = None) -> LatentDataset:
        """Open the latents at `uri`; InputError, naming `key`, when there are none. pins: see `open_kind`."""
        dataset: LatentDataset = cls.open_kind(uri, "latents", key, pins)
        return dataset

    def _facts(self) -> dict[str, str]:
        moments = {"moments": json.dumps([m.tolist() for m in self._channel_moments])} if self.num_rows else {}
        return super()._facts() | moments

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
        for file in range(len(self.row_groups.paths)):
            footer = self.footer(file)
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
        if "moments" in self._published:
            mean, std = np.array(json.loads(self._published["moments"]), np.float64)
            return mean, std
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
