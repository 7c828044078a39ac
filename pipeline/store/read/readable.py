"""The row groups a reader sees, as columns: opening a dataset costs no object for each of a million of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
import numpy.typing as npt

from pipeline.store.ledger.rowset import RowSet, address
from pipeline.store.ledger.state import VisibleFile
from pipeline.store.read.row_groups import RowGroupInfo

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
        self.partial = np.concatenate([np.zeros(0, np.bool_), *(_touched(f) for f in self.files)])
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


def _touched(file: VisibleFile) -> npt.NDArray[np.bool_]:
    """Of which row groups of a file some unit has a dead row: bool [groups]."""
    groups, dead = file.info.row_groups, file.dead
    if not dead:
        return np.zeros(len(groups), np.bool_)
    return touches(dead, groups.first_unit, groups.last_unit)


def touches(rows: RowSet, first_unit: Ints, last_unit: Ints) -> npt.NDArray[np.bool_]:
    """Whether a set has a row in any of the units [first_unit, last_unit]: bool, elementwise."""
    begun = np.searchsorted(rows.starts, address(last_unit + 1), side="left")
    ended = np.searchsorted(rows.stops, address(first_unit), side="right")
    return np.asarray(begun > ended)
