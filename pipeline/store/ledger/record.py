"""Commit records: the immutable facts from which the visible state of a dataset is folded.

One by one they are objects of JSON (`CommitRecord`, `parse_record`); all of a dataset's are columns (`Records`): a
ledger of a billion images holds half a million of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from pipeline.errors import InputError
from pipeline.storage.root import check_key
from pipeline.storage.stored import OPEN, Count, Key, problems
from pipeline.store.ledger import layout
from pipeline.store.ledger.rowset import Int64s, RowSet, check_addresses
from pipeline.store.read.row_groups import RowGroups
from pipeline.store.schema import USUAL_SHARES

# Of a record whose sets are intervals alone: earlier releases read those, too.
_PLAIN, RECORD_VERSION = 1, 2


@dataclass(frozen=True)
class FileInfo:
    """One immutable Parquet file of a commit."""

    path: str
    size_bytes: int
    sha256: str
    rows: int
    row_groups: RowGroups = field(default_factory=lambda: RowGroups.of(()))


@dataclass(frozen=True)
class CommitRecord:
    """What one write made visible: the row addresses it settles and the files that hold them.

    `covered` are all rows settled by this write: stored, rejected and filtered. `rejects` and `filtered` hold
    the addresses by reason. `unit_rows` tells the length of units whose length only reading could tell.
    A record of a newer generation may cover rows that older records hold (a retried reject, a compacted shard):
    it then holds them instead.
    """

    generation: int
    covered: RowSet
    files: tuple[FileInfo, ...] = ()
    reject_file: FileInfo | None = None
    rejects: Mapping[str, RowSet] = field(default_factory=dict)
    filtered: Mapping[str, RowSet] = field(default_factory=dict)
    unit_rows: Mapping[int, int] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal records have equal bytes, hence equal names."""
        sets = (self.covered, *self.rejects.values(), *self.filtered.values())
        return layout.canonical_json(
            {
                "version": RECORD_VERSION if any(len(rows.blocks) for rows in sets) else _PLAIN,
                "generation": self.generation,
                "covered": self.covered.to_json(),
                "files": [_file_json(f) for f in self.files],
                "reject_file": _file_json(self.reject_file) if self.reject_file else None,
                "rejects": {reason: rows.to_json() for reason, rows in self.rejects.items()},
                "filtered": {reason: rows.to_json() for reason, rows in self.filtered.items()},
                "unit_rows": [[u, n] for u, n in sorted(self.unit_rows.items())],
            }
        )

    @property
    def stored(self) -> RowSet:
        """The rows that lie in the record's data files."""
        return self.covered - self.settled

    @property
    def settled(self) -> RowSet:
        """The rows that lie in the record's reject file: rejected and filtered ones."""
        return RowSet.union_all([*self.rejects.values(), *self.filtered.values()])

    @property
    def paths(self) -> tuple[str, ...]:
        """The keys of its files: data, then rejects."""
        files = (*self.files, self.reject_file) if self.reject_file else self.files
        return tuple(f.path for f in files)

    @property
    def name(self) -> str:
        """The record's key: in the ledger of its generation, named by its content."""
        return f"{layout.ledger_dir(self.generation)}/{layout.content_name(self.to_bytes())}.json"


def parse_record(data: bytes, origin: str) -> CommitRecord:
    """The record in some bytes; InputError, naming `origin`, when they are damaged or from a newer release."""
    try:
        body = _BODY.validate_json(data)
        if body["version"] > RECORD_VERSION:
            raise InputError(
                f"The commit record {origin} has version {body['version']}",
                rule=f"this release reads versions up to {RECORD_VERSION}",
                next_step="upgrade latentloom",
            )
        return CommitRecord(
            generation=body["generation"],
            covered=RowSet.from_json(body["covered"]),
            files=tuple(_file(f) for f in body["files"]),
            reject_file=_file(body["reject_file"]) if body["reject_file"] else None,
            rejects={reason: RowSet.from_json(rows) for reason, rows in body["rejects"].items()},
            filtered={reason: RowSet.from_json(rows) for reason, rows in body["filtered"].items()},
            unit_rows=dict(body["unit_rows"]),
        )
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        why = problems(error) if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
        raise InputError(
            f"The commit record {origin} is damaged: {why}",
            rule="commit records are written once and never changed",
            next_step="restore the object from a backup or an older version of it; jobs.verify shows all damage",
        ) from None


def _file_json(file: FileInfo) -> dict[str, Any]:
    return {
        "path": file.path,
        "bytes": file.size_bytes,
        "sha256": file.sha256,
        "rows": file.rows,
        "groups": file.row_groups.to_columns(),
    }


@with_config(OPEN)
class _File(TypedDict):
    path: Key
    bytes: Count
    sha256: str
    rows: Count
    groups: Any  # long lists of numbers, which numpy checks faster, as it does those below


@with_config(OPEN)
class _Body(TypedDict):
    version: int
    generation: Count
    covered: Any
    files: list[_File]
    reject_file: _File | None
    rejects: dict[str, Any]
    filtered: dict[str, Any]
    unit_rows: list[tuple[Count, Count]]


_BODY = TypeAdapter(_Body)


def _file(body: _File) -> FileInfo:
    groups = RowGroups.from_columns(body["groups"])
    return FileInfo(body["path"], body["bytes"], body["sha256"], body["rows"], groups)


# -- All records of a dataset as columns -----------------------------------------------------------------------


def _list(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", kind, False))


# A line a record. Its sets come one after the other, and so do their spans and blocks; its files, the data files
# before the reject file, and so do their row groups: seven numbers each (see `RowGroups`), and for each channel a
# sum, then for each a sum of squares.
RECORDS = pa.schema(
    [
        pa.field("name", pa.string(), False),
        pa.field("generation", pa.int64(), False),
        pa.field("unit_rows", _list(pa.int64()), False),  # unit, rows
        pa.field("set_kind", _list(pa.int8()), False),  # covered, rejected, filtered
        pa.field("set_reason", _list(pa.string()), False),
        pa.field("set_spans", _list(pa.int64()), False),
        pa.field("set_blocks", _list(pa.int64()), False),
        pa.field("span_keys", _list(pa.int64()), False),  # start, stop, as addresses: unit << 32 | row
        pa.field("block_numbers", _list(pa.int64()), False),  # address // 512
        pa.field("block_bits", _list(pa.uint64()), False),  # eight a block
        pa.field("file_path", _list(pa.string()), False),
        pa.field("file_sha256", _list(pa.string()), False),
        pa.field("file_numbers", _list(pa.int64()), False),  # bytes, rows
        pa.field("file_groups", _list(pa.int64()), False),
        pa.field("file_channels", _list(pa.int64()), False),
        pa.field("reject_file", pa.bool_(), False),
        pa.field("group_bucket", _list(pa.string()), False),
        pa.field("group_numbers", _list(pa.int64()), False),
        pa.field("group_sums", _list(pa.float64()), False),
        pa.field("group_held", _list(pa.int32()), False),  # see `RowGroups`
    ]
)
COVERED, REJECTED, FILTERED = range(3)
_NUMBERS = 7  # of a row group


class Records(Sequence[tuple[str, CommitRecord]]):
    """Commit records as columns, ordered by name: by generation, then by content; an item is made when asked for.

    `table` has the schema RECORDS. ValueError for one whose columns do not fit together; `checked`: it is made of
    such as do.
    """

    def __init__(self, table: pa.Table, *, checked: bool = False) -> None:
        self.table = (table if checked else table.select(RECORDS.names).cast(RECORDS)).combine_chunks()
        if not checked:
            self._check()

    @staticmethod
    def of(named: Iterable[tuple[str, CommitRecord]]) -> Records:
        """From one object each, in any order; of one name the last."""
        lines = sorted(dict(named).items())
        if not lines:
            return Records(RECORDS.empty_table(), checked=True)
        columns: dict[str, list[Any]] = {name: [] for name in RECORDS.names}
        for name, record in lines:
            for key, value in _line(record).items():
                columns[key].append(value)
            columns["name"].append(name)
        arrays = [_column(columns[field.name], field.type) for field in RECORDS]
        return Records(pa.Table.from_arrays(arrays, schema=RECORDS))

    @staticmethod
    def union(parts: Sequence[Records]) -> Records:
        """The records of several, each name once."""
        parts = [part for part in parts if len(part)]
        if len(parts) == 1:
            return parts[0]
        table = pa.concat_tables([part.table for part in parts]) if parts else RECORDS.empty_table()
        names = table["name"].combine_chunks()
        if len(names) > 1 and not pc.all(pc.less(names[:-1], names[1:])).as_py():
            order = pc.sort_indices(names)
            sorted_names = names.take(order)
            first = pc.not_equal(sorted_names[:-1], sorted_names[1:]).to_numpy(zero_copy_only=False)
            table = table.take(order.filter(pa.array(np.concatenate([[True], first]))))
        return Records(table, checked=True)

    def take(self, chosen: npt.NDArray[np.bool_]) -> Records:
        """Those that are chosen."""
        return self if chosen.all() else Records(self.table.filter(pa.array(chosen)), checked=True)

    @cached_property
    def generation(self) -> Int64s:
        """Of each: int64 [n]."""
        return np.asarray(self.table["generation"].to_numpy())

    def flat(self, name: str) -> Any:
        """All values of a list column, in order."""
        return self._array(name).values.to_numpy(zero_copy_only=False)

    def places(self, name: str) -> Int64s:
        """Where the values of each record begin in `flat`, and where they end: int64 [n + 1]."""
        return np.asarray(self._array(name).offsets).astype(np.int64)

    def texts(self, name: str) -> pa.StringArray:
        """As `flat`, of a column of texts."""
        return self._array(name).values

    def _array(self, name: str) -> pa.ListArray:
        column = self.table[name]
        return column.chunk(0) if column.num_chunks else pa.array([], RECORDS.field(name).type)

    @cached_property
    def set_owner(self) -> Int64s:
        """The record of each set: int64 [sets]."""
        return np.repeat(np.arange(len(self)), np.diff(self.places("set_kind")))

    @cached_property
    def file_owner(self) -> Int64s:
        """The record of each file: int64 [files]."""
        return np.repeat(np.arange(len(self)), np.diff(self.places("file_path")))

    @cached_property
    def is_reject_file(self) -> npt.NDArray[np.bool_]:
        """Whether each file holds rejects: it is the last one of its record then: bool [files]."""
        last = np.zeros(len(self.file_owner), np.bool_)
        last[self.places("file_path")[1:][self.table["reject_file"].to_numpy()] - 1] = True
        return last

    @cached_property
    def group_places(self) -> Int64s:
        """Where the row groups of each file begin among all, and where they end: int64 [files + 1]."""
        return _ends(self.flat("file_groups"))

    def covered(self, at: int) -> RowSet:
        """The rows that a record settles: the first of its sets."""
        number = int(self.places("set_kind")[at])
        return self._set(number, int(self.places("span_keys")[at]) // 2, int(self.places("block_numbers")[at]))

    def _set(self, number: int, span: int, block: int) -> RowSet:
        """One of all sets, whose spans and blocks begin there."""
        spans, blocks = int(self.flat("set_spans")[number]), int(self.flat("set_blocks")[number])
        keys = self.flat("span_keys")[2 * span : 2 * (span + spans)].reshape(-1, 2)
        bits = self.flat("block_bits")[8 * block : 8 * (block + blocks)].reshape(-1, 8)
        return RowSet.from_parts(keys[:, 0], keys[:, 1], self.flat("block_numbers")[block : block + blocks], bits)

    def rows_of(self, sets: npt.NDArray[np.bool_]) -> RowSet:
        """The union of those of all sets that are chosen."""
        if not sets.any():
            return RowSet.empty()
        spans, blocks = np.repeat(sets, self.flat("set_spans")), np.repeat(sets, self.flat("set_blocks"))
        keys = self.flat("span_keys").reshape(-1, 2)[spans]
        numbers, bits = self.flat("block_numbers"), self.flat("block_bits").reshape(-1, 8)
        return RowSet.from_parts(keys[:, 0], keys[:, 1], numbers[blocks], bits[blocks])

    def settled(self, generation: int) -> RowSet:
        """The rows that the records of a generation settle."""
        return self.rows_of((self.flat("set_kind") == COVERED) & (self.generation == generation)[self.set_owner])

    def file(self, number: int) -> FileInfo:
        """One of all files."""
        size, rows = self.flat("file_numbers")[2 * number : 2 * number + 2].tolist()
        begin, end = self.group_places[number : number + 2].tolist()
        path, digest = (self.texts(name)[number].as_py() for name in ("file_path", "file_sha256"))
        groups = RowGroups(
            tuple(self.texts("group_bucket")[begin:end].to_pylist()),
            self.flat("group_numbers")[_NUMBERS * begin : _NUMBERS * end].reshape(-1, _NUMBERS),
            *self._sums(number),
            self.held[begin:end] if self._tells[self.file_owner[number]] else self.held[begin:end, :0],
        )
        return FileInfo(path, size, digest, rows, groups)

    def _sums(self, number: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        begin, end = self._sum_places[number : number + 2].tolist()
        channels = int(self.flat("file_channels")[number])
        sums = self.flat("group_sums")[begin:end].reshape(-1, 2, channels) if channels else np.zeros((0, 2, 0))
        groups = int(self.flat("file_groups")[number])
        return (sums[:, 0], sums[:, 1]) if channels else (np.zeros((groups, 0)), np.zeros((groups, 0)))

    def sums_of(self, groups: Int64s, channels: int) -> npt.NDArray[np.float64]:
        """Sums and sums of squares of some of all row groups, of so many channels: float64 [n, 2, channels]."""
        if (self.flat("file_channels")[self.flat("file_groups") > 0] == channels).all():
            return np.asarray(self.flat("group_sums").reshape(-1, 2, channels)[groups])
        sizes = np.repeat(2 * self.flat("file_channels"), self.flat("file_groups"))
        begins = (np.cumsum(sizes) - sizes)[groups]
        return np.asarray(self.flat("group_sums")[begins[:, None] + np.arange(2 * channels)].reshape(-1, 2, channels))

    @cached_property
    def held(self) -> npt.NDArray[np.int32]:
        """Rows that each of USUAL_SHARES holds out, int32 [row groups, shares]; -1 where a record does not tell."""
        groups = np.diff(self.places("group_bucket"))
        held = np.full((int(groups.sum()), len(USUAL_SHARES)), -1, np.int32)
        held[np.repeat(self._tells, groups)] = self.flat("group_held").reshape(-1, len(USUAL_SHARES))
        return held

    @cached_property
    def _tells(self) -> npt.NDArray[np.bool_]:
        return np.asarray(np.diff(self.places("group_held")) > 0)

    @cached_property
    def _sum_places(self) -> Int64s:
        return _ends(2 * self.flat("file_groups") * self.flat("file_channels"))

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> tuple[str, CommitRecord]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[tuple[str, CommitRecord], ...]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        at = range(len(self))[index]
        return self.table["name"][at].as_py(), self._record(at)

    def __iter__(self) -> Iterator[tuple[str, CommitRecord]]:
        return (self[i] for i in range(len(self)))

    def _record(self, at: int) -> CommitRecord:
        begin, end = self.places("set_kind")[at : at + 2].tolist()
        kinds, reasons = self.flat("set_kind")[begin:end], self.texts("set_reason")[begin:end].to_pylist()
        span, block = int(self.places("span_keys")[at]) // 2, int(self.places("block_numbers")[at])
        sets: dict[int, dict[str, RowSet]] = {kind: {} for kind in (COVERED, REJECTED, FILTERED)}
        for number, (kind, reason) in enumerate(zip(kinds.tolist(), reasons, strict=True), begin):
            sets[kind][reason] = self._set(number, span, block)
            span, block = span + int(self.flat("set_spans")[number]), block + int(self.flat("set_blocks")[number])
        first, last = self.places("file_path")[at : at + 2].tolist()
        files = [self.file(number) for number in range(first, last)]
        rejects = files.pop() if self.table["reject_file"][at].as_py() else None
        ends = self.places("unit_rows")[at : at + 2]
        pairs = self.flat("unit_rows")[ends[0] : ends[1]].reshape(-1, 2).tolist()
        return CommitRecord(
            int(self.generation[at]),
            sets[COVERED][""],
            tuple(files),
            rejects,
            sets[REJECTED],
            sets[FILTERED],
            dict(pairs),
        )

    def _check(self) -> None:
        """ValueError unless every record's parts are as many as it says and their numbers can be."""
        by_record = {
            "span_keys": 2 * self._per_record("set_spans", "set_kind"),
            "block_numbers": self._per_record("set_blocks", "set_kind"),
            "block_bits": 8 * self._per_record("set_blocks", "set_kind"),
            "group_bucket": self._per_record("file_groups", "file_path"),
            "group_numbers": _NUMBERS * self._per_record("file_groups", "file_path"),
        }
        for name in ("set_reason", "set_spans", "set_blocks"):
            by_record[name] = np.diff(self.places("set_kind"))
        for name in ("file_sha256", "file_groups", "file_channels"):
            by_record[name] = np.diff(self.places("file_path"))
        by_record["file_numbers"] = 2 * np.diff(self.places("file_path"))
        fits = [np.array_equal(np.diff(self.places(name)), sizes) for name, sizes in by_record.items()]
        fits.append(len(self.flat("group_sums")) == self._sum_places[-1])
        held, groups = np.diff(self.places("group_held")), by_record["group_bucket"]
        fits.append(((held == 0) | (held == len(USUAL_SHARES) * groups)).all())
        # Each has one set of all that it covers, the first.
        kinds, firsts = self.flat("set_kind"), self.places("set_kind")[:-1]
        covering = np.flatnonzero(kinds == COVERED)
        fits += [np.array_equal(covering, firsts), kinds.min(initial=0) >= COVERED, kinds.max(initial=0) <= FILTERED]
        numbers = ("unit_rows", "file_numbers", "file_channels", "group_held")
        counts = (self.generation, *(self.flat(name) for name in numbers))
        fits += [values.min(initial=0) >= 0 for values in counts]
        if not all(fits):
            raise ValueError("the columns of its records do not fit together")
        keys = self.flat("span_keys").reshape(-1, 2)
        check_addresses(keys[:, 0], keys[:, 1], self.flat("block_numbers"))
        for path in pc.unique(self.texts("file_path")).to_pylist():
            check_key(path)
        RowGroups.check(
            pc.unique(self.texts("group_bucket")).to_pylist(), self.flat("group_numbers").reshape(-1, _NUMBERS)
        )
        told = self.held[:, 0] >= 0
        RowGroups.check_held(self.held[told], self.flat("group_numbers").reshape(-1, _NUMBERS)[told, 0])

    def _per_record(self, counts: str, owner: str) -> Int64s:
        """The sum of a column of counts over each record."""
        values, places = self.flat(counts), self.places(owner)
        if len(values) != places[-1] or values.min(initial=0) < 0:
            raise ValueError("the columns of its records do not fit together")
        return np.diff(np.concatenate([[0], np.cumsum(values)])[places])


def _ends(sizes: Int64s) -> Int64s:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _line(record: CommitRecord) -> dict[str, Any]:
    """A record's values of all columns but the name."""
    sets = [(COVERED, "", record.covered)]
    sets += [(REJECTED, reason, rows) for reason, rows in sorted(record.rejects.items())]
    sets += [(FILTERED, reason, rows) for reason, rows in sorted(record.filtered.items())]
    files = [*record.files, *([record.reject_file] if record.reject_file else [])]
    groups = [file.row_groups for file in files]
    sums = [np.concatenate([g.sums, g.sumsqs], axis=1).reshape(-1) for g in groups if g.sums.size]
    held = [g.held.reshape(-1) for g in groups] if all(g.held.size for g in groups if len(g)) else []
    return {
        "generation": record.generation,
        "unit_rows": [number for pair in sorted(record.unit_rows.items()) for number in pair],
        "set_kind": [kind for kind, _, _ in sets],
        "set_reason": [reason for _, reason, _ in sets],
        "set_spans": [len(rows.starts) for *_, rows in sets],
        "set_blocks": [len(rows.blocks) for *_, rows in sets],
        "span_keys": np.concatenate([np.stack([rows.starts, rows.stops], axis=1).reshape(-1) for *_, rows in sets]),
        "block_numbers": np.concatenate([rows.blocks for *_, rows in sets]),
        "block_bits": np.concatenate([rows.bits.reshape(-1) for *_, rows in sets]),
        "file_path": [file.path for file in files],
        "file_sha256": [file.sha256 for file in files],
        "file_numbers": [number for file in files for number in (file.size_bytes, file.rows)],
        "file_groups": [len(g) for g in groups],
        "file_channels": [g.sums.shape[1] if len(g) else 0 for g in groups],
        "reject_file": record.reject_file is not None,
        "group_bucket": [bucket for g in groups for bucket in g.buckets],
        "group_numbers": np.concatenate([np.zeros(0, np.int64), *(g.whole.reshape(-1) for g in groups)]),
        "group_sums": np.concatenate([np.zeros(0), *sums]),
        "group_held": np.concatenate([np.zeros(0, np.int32), *held]),
    }


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Values of all records as an Arrow array; of a list column one sequence each, laid end to end."""
    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    ends = pa.array(_ends(np.array([len(value) for value in values], np.int64)), pa.int32())
    if values and isinstance(values[0], np.ndarray):
        flat = pa.array(np.concatenate(values), kind.value_type)
    else:
        flat = pa.array([item for value in values for item in value], kind.value_type)
    return pa.ListArray.from_arrays(ends, flat, type=kind)
