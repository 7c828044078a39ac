"""The row groups of a file as columns: a ledger of a billion images holds millions of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import InputError
from pipeline.storage.errors import job_error, unreadable
from pipeline.store.ledger.rowset import RowSet, address
from pipeline.store.schema import USUAL_SHARES

Ints = npt.NDArray[np.int64]
_BUCKET = re.compile(r"[1-9]\d{0,5}x[1-9]\d{0,5}")
_UNITS = 1 << 31
_WHOLE = ("rows", "bytes", "first_unit", "last_unit", "values", "label_max", "unlabelled")
_LEAST = np.array([0, 0, 0, 0, 0, -1, 0])


@dataclass(frozen=True)
class RowGroupInfo:
    """One row group of a data file: its bucket, rows, stored bytes, the units it spans, and sums for statistics.

    `channel_sum` and `channel_sumsq` are over all values of each latent channel, `values` how many each channel
    has; they are empty for kinds without latents. `label_max` is -1 when no row has a label. `held`: how many rows
    each of USUAL_SHARES holds out of training; empty where nobody has told.
    """

    bucket: str
    rows: int
    size_bytes: int
    first_unit: int
    last_unit: int
    channel_sum: tuple[float, ...] = ()
    channel_sumsq: tuple[float, ...] = ()
    values: int = 0
    label_max: int = -1
    unlabelled: int = 0
    held: tuple[int, ...] = ()


class RowGroups(Sequence[RowGroupInfo]):
    """The row groups of one file, in file order; immutable.

    Kept as arrays, about a tenth of the memory of one object each: `whole` int64 [n, 7] (rows, bytes, first_unit,
    last_unit, values, label_max, unlabelled), `sums` and `sumsqs` float64 [n, channels], `held` int32 [n, shares] or,
    where nobody has told, [n, 0].
    """

    __slots__ = ("buckets", "held", "sums", "sumsqs", "whole")

    def __init__(
        self,
        buckets: tuple[str, ...],
        whole: npt.NDArray[np.int64],
        sums: npt.NDArray[np.float64],
        sumsqs: npt.NDArray[np.float64],
        held: npt.NDArray[np.int32],
    ) -> None:
        self.buckets, self.whole, self.sums, self.sumsqs, self.held = buckets, whole, sums, sumsqs, held

    @classmethod
    def of(cls, infos: Sequence[RowGroupInfo]) -> RowGroups:
        """From one object each; ValueError when they do not have the same number of channels."""
        whole = [
            (i.rows, i.size_bytes, i.first_unit, i.last_unit, i.values, i.label_max, i.unlabelled) for i in infos
        ]
        return cls(
            tuple(i.bucket for i in infos),
            np.array(whole, np.int64).reshape(-1, len(_WHOLE)),
            _floats([i.channel_sum for i in infos]),
            _floats([i.channel_sumsq for i in infos]),
            np.array([i.held for i in infos], np.int32).reshape(len(infos), -1 if len(infos) else 0),
        )

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any]) -> RowGroups:
        """From the lists of a commit record; ValueError or KeyError when they do not fit together."""
        buckets = columns["bucket"]
        names = {name: name for name in buckets}  # one string object per distinct bucket
        whole = np.array([columns[name] for name in _WHOLE], np.int64).reshape(len(_WHOLE), -1)
        sums, sumsqs = _floats(columns["sum"]), _floats(columns["sumsq"])
        if not len(buckets) == whole.shape[1] == len(sums) == len(sumsqs) or sums.shape != sumsqs.shape:
            raise ValueError("the columns of the row groups differ in length")
        told = columns.get("held")
        held = np.zeros((len(buckets), 0), np.int32)
        if told is not None:
            held = np.array(told, np.int32).reshape(len(buckets), len(USUAL_SHARES))
        cls.check(names, whole.T)
        cls.check_held(held, whole[0])
        return cls(tuple(names[b] for b in buckets), np.ascontiguousarray(whole.T), sums, sumsqs, held)

    @staticmethod
    def check_held(held: npt.NDArray[np.int32], rows: npt.NDArray[np.int64]) -> None:
        """ValueError unless a larger share holds out as many rows as a smaller one or more, of those there are."""
        if held.size and ((held[:, 0] < 0).any() or (np.diff(held) < 0).any() or (held[:, -1] > rows).any()):
            raise ValueError("the row groups hold out impossible numbers of rows")

    @staticmethod
    def check(buckets: Iterable[str], whole: npt.NDArray[np.int64]) -> None:
        """ValueError for buckets or numbers, int64 [n, 7], that no row group has."""
        if not all(_BUCKET.fullmatch(name) for name in buckets):
            raise ValueError("a bucket is no HxW")
        if ((whole < _LEAST) | (whole[:, 3:4] >= _UNITS)).any():
            raise ValueError("the row groups hold impossible numbers")

    def to_columns(self) -> dict[str, Any]:
        """The lists of a commit record."""
        whole = dict(zip(_WHOLE, self.whole.T.tolist(), strict=True))
        held = {"held": self.held.tolist()} if self.held.size else {}
        return {
            "bucket": list(self.buckets),
            "sum": self.sums.tolist(),
            "sumsq": self.sumsqs.tolist(),
            **whole,
            **held,
        }

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Rows of each, int64 [n]."""
        return self.whole[:, 0]

    @property
    def size_bytes(self) -> npt.NDArray[np.int64]:
        """Stored bytes of each, int64 [n]."""
        return self.whole[:, 1]

    @property
    def first_unit(self) -> npt.NDArray[np.int64]:
        """The lowest unit in each, int64 [n]."""
        return self.whole[:, 2]

    @property
    def last_unit(self) -> npt.NDArray[np.int64]:
        """The highest unit in each, int64 [n]."""
        return self.whole[:, 3]

    def __len__(self) -> int:
        return len(self.buckets)

    @overload
    def __getitem__(self, index: int) -> RowGroupInfo: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[RowGroupInfo, ...]: ...
    def __getitem__(self, index: int | slice) -> RowGroupInfo | tuple[RowGroupInfo, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        rows, size, first, last, values, label_max, unlabelled = self.whole[index].tolist()
        sums, sumsqs, held = (tuple(each[index].tolist()) for each in (self.sums, self.sumsqs, self.held))
        facts = (rows, size, first, last, sums, sumsqs, values, label_max, unlabelled, held)
        return RowGroupInfo(self.buckets[index], *facts)

    def __iter__(self) -> Iterator[RowGroupInfo]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowGroups) and self.to_columns() == other.to_columns()

    def __hash__(self) -> int:
        return hash((self.buckets, self.whole.tobytes()))

    def __repr__(self) -> str:
        return f"RowGroups({list(self)!r})"


def _floats(rows: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    return np.array(rows, np.float64).reshape(len(rows), -1) if len(rows) else np.zeros((0, 0))


# -- The row groups a reader sees, as columns: opening a dataset costs no object for each of a million of them -


@dataclass(frozen=True)
class RowGroup:
    """One readable row group: its place, its bucket ("HxW" pixels) and its visible rows."""

    index: int
    file: str
    group: int
    bucket: str
    num_rows: int
    size_bytes: int


@dataclass
class ReadableGroups(Sequence[RowGroup]):
    """All row groups with a visible row, in order, as parallel arrays; an item is made when it is asked for.

    paths, file_bytes, file_groups: of the visible files in order their keys, sizes and numbers of row groups; dead:
    their dead rows, by file. file_of, number: which file and which of its groups; rows: visible ones; bucket_of: in
    `buckets`; partial: some stored rows of the group may be dead; numbers, int64 [n, 7], and sums, float64
    [n, 2, channels], as the ledger tells them (see `RowGroups`); sums are None where files differ in channels. held:
    how many stored rows each of USUAL_SHARES holds out, int32 [n, shares], -1 where nobody has told.
    """

    paths: pa.StringArray
    file_bytes: Ints
    file_groups: Ints
    file_of: Ints
    number: Ints
    rows: Ints
    bucket_of: Ints
    numbers: Ints
    dead: dict[int, RowSet]
    partial: npt.NDArray[np.bool_]
    sums: npt.NDArray[np.float64] | None
    buckets: tuple[str, ...]
    held: npt.NDArray[np.int32]

    @classmethod
    def of(
        cls,
        paths: pa.StringArray,
        file_bytes: Ints,
        file_groups: Ints,
        dead: dict[int, RowSet],
        numbers: Ints,
        sums: npt.NDArray[np.float64] | None,
        buckets: pa.StringArray,
        held: npt.NDArray[np.int32],
    ) -> ReadableGroups:
        """From files and all their row groups; `rows` are the stored ones until `keep` is told better."""
        file_of = np.repeat(np.arange(len(paths)), file_groups)
        number = np.arange(len(file_of)) - (np.cumsum(file_groups) - file_groups)[file_of]
        partial = np.zeros(len(file_of), np.bool_)
        for at, rows in dead.items():  # of which row groups some unit has a dead row
            mine = slice(*np.searchsorted(file_of, [at, at + 1]).tolist())
            partial[mine] = rows.touches(address(numbers[mine, 2]), address(numbers[mine, 3] + 1))
        codes = buckets.dictionary_encode()
        bucket_of, names = codes.indices.to_numpy().astype(np.int64), tuple(codes.dictionary.to_pylist())
        whole = numbers[:, 0].copy()
        columns = (file_bytes, file_groups, file_of, number, whole, bucket_of, numbers)
        return cls(paths, *columns, dead, partial, sums, names, held)

    def keep(self, counts: Mapping[int, int]) -> None:
        """Take the numbers of visible rows of partial groups, and leave out the groups that have none."""
        for at, count in counts.items():
            self.rows[at] = count
        visible = self.rows > 0
        if not visible.all():
            for name in ("file_of", "number", "rows", "bucket_of", "partial", "numbers", "held"):
                setattr(self, name, getattr(self, name)[visible])
            self.sums = None if self.sums is None else self.sums[visible]
            used, self.bucket_of = np.unique(self.bucket_of, return_inverse=True)
            self.buckets = tuple(self.buckets[at] for at in used.tolist())

    @property
    def size_bytes(self) -> Ints:
        """Stored bytes of each: int64 [n]."""
        return self.numbers[:, 1]

    def path(self, file: int) -> str:
        """The key of a file."""
        return str(self.paths[file].as_py())

    def place(self, index: int) -> tuple[int, int]:
        """The file of a group and its number in it."""
        return int(self.file_of[index]), int(self.number[index])

    def info(self, index: int) -> RowGroupInfo:
        """What the ledger tells about a group."""
        rows, size, first, last, values, label_max, unlabelled = self.numbers[index].tolist()
        sums, squares = ((), ()) if self.sums is None else map(tuple, self.sums[index].tolist())
        bucket = self.buckets[self.bucket_of[index]]
        return RowGroupInfo(bucket, rows, size, first, last, sums, squares, values, label_max, unlabelled)

    def within(self, first_unit: int, stop_unit: int) -> Iterator[tuple[int, RowGroupInfo]]:
        """(index, info) of those that may hold rows of units [first_unit, stop_unit)."""
        hits = (self.stored("first_unit") < stop_unit) & (self.stored("last_unit") >= first_unit)
        return ((at, self.info(at)) for at in np.flatnonzero(hits).tolist())

    def stored(self, name: str) -> Ints:
        """One whole-number column of the ledger's, such as label_max, for the groups here: int64 [n]."""
        return self.numbers[:, _WHOLE.index(name)]

    def held_out(self, share: float) -> Ints | None:
        """How many visible rows of each a share holds out of training, int64 [n], -1 where rows must tell.

        None for a share that commits tell nothing of.
        """
        if share not in USUAL_SHARES:
            return None
        return np.where(self.partial, -1, self.held[:, USUAL_SHARES.index(share)]).astype(np.int64)

    def channel_sums(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The ledger's sums and sums of squares of each group: float64 [n, channels]."""
        if self.sums is None:
            raise InputError(
                "Files of one dataset hold latents of different numbers of channels",
                rule="all latents of a dataset have the channels of its codec",
                next_step="python -m jobs.verify shows all damage",
            )
        return self.sums[:, 0], self.sums[:, 1]

    def to_arrow(self, facts: Mapping[str, str]) -> pa.Buffer:
        """As an Arrow file of one line, which readers map; with facts as its metadata."""
        dead = [RowSet.empty(), *self.dead.values()]
        sums = np.zeros(0) if self.sums is None else self.sums
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {"partial": self.partial.astype(np.uint8), "sums": sums}
        arrays["channels"] = np.array([sums.shape[-1] if sums.ndim == 3 else 0])
        arrays["dead_files"] = np.array(list(self.dead), np.int64)
        arrays["span_counts"] = np.array([len(rows.starts) for rows in dead[1:]], np.int64)
        arrays["block_counts"] = np.array([len(rows.blocks) for rows in dead[1:]], np.int64)
        arrays |= {f"dead_{name}": np.concatenate([vars(rows)[name] for rows in dead]) for name in _DEAD}
        flat = {name: pa.array(values.reshape(-1)) for name, values in arrays.items()}
        flat |= {"paths": self.paths, "buckets": pa.array(self.buckets, pa.string())}
        lists = [pa.LargeListArray.from_arrays(pa.array([0, len(v)], pa.int64()), v) for v in flat.values()]
        table = pa.Table.from_arrays(lists, list(flat)).replace_schema_metadata(dict(facts))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue()

    @classmethod
    def from_arrow(cls, source: Any) -> tuple[ReadableGroups, dict[str, str]]:
        """(the groups, the facts) of `to_arrow`, views of what is mapped.

        An error of Arrow's, KeyError or ValueError for another file.
        """
        table = pa.ipc.open_file(source).read_all()
        flat = {name: table[name].chunk(0).values for name in table.column_names}
        paths, buckets = flat.pop("paths"), tuple(flat.pop("buckets").to_pylist())
        arrays = {name: values.to_numpy() for name, values in flat.items()}
        starts, stops, blocks, bits = (arrays[f"dead_{name}"] for name in _DEAD)
        bits = bits.reshape(-1, 8)
        dead, span, block = {}, 0, 0
        counts = (arrays[name].tolist() for name in ("dead_files", "span_counts", "block_counts"))
        for file, spans, several in zip(*counts, strict=True):
            mine, theirs = slice(span, span + spans), slice(block, block + several)
            dead[file] = RowSet.from_parts(starts[mine], stops[mine], blocks[theirs], bits[theirs])
            span, block = mine.stop, theirs.stop
        channels = int(arrays["channels"][0])
        sums = arrays["sums"].reshape(-1, 2, channels) if channels else None
        partial = arrays["partial"].view(np.bool_)
        columns = {name: arrays[name] for name in _ARRAYS}
        columns["numbers"] = columns["numbers"].reshape(-1, len(_WHOLE))
        columns["held"] = columns["held"].reshape(-1, len(USUAL_SHARES))
        made = cls(paths=paths, dead=dead, partial=partial, sums=sums, buckets=buckets, **columns)
        facts = table.schema.metadata or {}
        return made, {key.decode(): value.decode() for key, value in facts.items()}

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
        bucket, rows, size = self.buckets[self.bucket_of[at]], int(self.rows[at]), int(self.numbers[at, 1])
        return RowGroup(at, self.path(int(self.file_of[at])), int(self.number[at]), bucket, rows, size)


_ARRAYS = ("file_bytes", "file_groups", "file_of", "number", "rows", "bucket_of", "numbers", "held")
_DEAD = ("starts", "stops", "blocks", "bits")


# -- Files read back: what is wrong with one is an input error that names it -----------------------------------


_REPAIR = "restore it from a backup; python -m jobs.verify shows all damage"


@contextmanager
def reading_table(where: str, next_step: str = _REPAIR) -> Iterator[None]:
    """InputError, naming `where`, for whatever a damaged, lost or foreign Parquet file makes of the block.

    The block opens and decodes that one file, and no more. What a store refuses, or its silence, stays what it is.
    """
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, OverflowError) as error:
        lost = isinstance(error, FileNotFoundError)
        if not lost and job_error(error) is not None:
            raise
        detail = " ".join(str(error).split())[:300]
        raise unreadable(where, "it is gone" if lost else detail, next_step=next_step) from error
