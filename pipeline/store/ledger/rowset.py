"""Sets of row addresses (unit, row) as sorted half-open intervals; all operations are vectorised."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]

# A row address is one integer: unit in the upper half, row in the lower. A stop of MAX_ROWS means "to the end".
_SHIFT = 32
MAX_ROWS = 1 << 31


Units = TypeVar("Units", int, Int64s)


def address(unit: Units) -> Units:
    """The address integer of row 0 of a unit, or of many; that of row r is r more."""
    return unit << _SHIFT


def unit_of(key: int) -> int:
    """The unit of an address integer."""
    return key >> _SHIFT


@dataclass(frozen=True, eq=False)
class RowSet:
    """An immutable set of row addresses: `starts` and `stops` are sorted, disjoint and never touch."""

    starts: Int64s
    stops: Int64s

    @staticmethod
    def empty() -> RowSet:
        """The set without rows."""
        none = np.zeros(0, np.int64)
        return RowSet(none, none)

    @staticmethod
    def from_triples(triples: Iterable[Sequence[int]]) -> RowSet:
        """From (unit, start, stop) triples in any order, overlapping or not."""
        triples = list(triples)
        if len(triples) == 1:
            # Most commit records settle one run of rows: opening a large ledger makes this call per record.
            unit, start, stop = triples[0]
            if 0 <= unit < MAX_ROWS and 0 <= start < stop <= MAX_ROWS:
                base = unit << _SHIFT
                return RowSet(np.array((base + start,), np.int64), np.array((base + stop,), np.int64))
        array = np.array([tuple(t) for t in triples], np.int64).reshape(-1, 3)
        return RowSet.from_arrays(array[:, 0], array[:, 1], array[:, 2])

    @staticmethod
    def from_arrays(units: Int64s, starts: Int64s, stops: Int64s) -> RowSet:
        """From parallel arrays of units, first rows and stop rows; ValueError for rows outside [0, 2^31]."""
        if len(units) and (units.min() < 0 or starts.min() < 0 or stops.max() > MAX_ROWS or units.max() >= MAX_ROWS):
            raise ValueError("row addresses must have 0 <= unit < 2^31 and 0 <= start <= stop <= 2^31")
        base = units.astype(np.int64) << _SHIFT
        return _merged(base + starts, base + stops)

    @staticmethod
    def from_keys(starts: Int64s, stops: Int64s) -> RowSet:
        """From half-open intervals of address integers, as other sets hold them."""
        return _merged(starts, stops)

    @staticmethod
    def from_rows(units: Int64s, rows: Int64s) -> RowSet:
        """From single addresses, in any order, repeated or not."""
        return RowSet.from_arrays(units, rows, rows + 1)

    @staticmethod
    def union_all(sets: Sequence[RowSet]) -> RowSet:
        """The union of many sets at the cost of one sort."""
        if not sets:
            return RowSet.empty()
        return _merged(np.concatenate([s.starts for s in sets]), np.concatenate([s.stops for s in sets]))

    def triples(self) -> list[list[int]]:
        """[[unit, start, stop], ...] in address order."""
        units = self.starts >> _SHIFT
        base = units << _SHIFT
        return np.stack([units, self.starts - base, self.stops - base], axis=1).tolist()  # type: ignore[no-any-return]

    def sql(self) -> str:
        """A condition on the columns unit and row that is true for its rows; the set has some."""
        return " OR ".join(
            f'("unit" = {unit} AND "row" >= {start} AND "row" < {stop})' for unit, start, stop in self.triples()
        )

    def count(self) -> int:
        """The number of rows."""
        return int((self.stops - self.starts).sum())

    def units(self) -> Int64s:
        """The distinct units, ascending."""
        return np.unique(self.starts >> _SHIFT)

    def of_unit(self, unit: int) -> list[tuple[int, int]]:
        """The (start, stop) intervals of one unit."""
        low, high = np.searchsorted(self.starts, [unit << _SHIFT, (unit + 1) << _SHIFT])
        base = unit << _SHIFT
        return [
            (int(a) - base, int(b) - base) for a, b in zip(self.starts[low:high], self.stops[low:high], strict=True)
        ]

    def contains(self, units: Int64s, rows: Int64s) -> npt.NDArray[np.bool_]:
        """Elementwise membership."""
        return self.covers((units.astype(np.int64) << _SHIFT) + rows)

    def covers(self, keys: Int64s) -> npt.NDArray[np.bool_]:
        """Elementwise membership of address integers."""
        after_start = np.searchsorted(self.starts, keys, side="right")
        after_stop = np.searchsorted(self.stops, keys, side="right")
        return np.asarray(after_start > after_stop)

    def __bool__(self) -> bool:
        return len(self.starts) > 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RowSet):
            return NotImplemented
        return np.array_equal(self.starts, other.starts) and np.array_equal(self.stops, other.stops)

    __hash__ = None  # type: ignore[assignment]

    def __or__(self, other: RowSet) -> RowSet:
        return RowSet.union_all([self, other])

    def __and__(self, other: RowSet) -> RowSet:
        return self._combine(other, keep_other=True)

    def __sub__(self, other: RowSet) -> RowSet:
        return self._combine(other, keep_other=False)

    def _combine(self, other: RowSet, keep_other: bool) -> RowSet:
        if not self or not other:
            return RowSet.empty() if keep_other or not self else self
        # Cut the line at every boundary: inside one elementary segment membership does not change.
        cuts = np.unique(np.concatenate([self.starts, self.stops, other.starts, other.stops]))
        left, right = cuts[:-1], cuts[1:]
        keep = self.covers(left) & (other.covers(left) == keep_other)
        return _merged(left[keep], right[keep])


def _merged(starts: Int64s, stops: Int64s) -> RowSet:
    keep = stops > starts
    starts, stops = starts[keep], stops[keep]
    if not len(starts):
        return RowSet.empty()
    order = np.argsort(starts, kind="stable")
    starts, stops = starts[order], stops[order]
    reach = np.maximum.accumulate(stops)
    first = np.concatenate([[True], starts[1:] > reach[:-1]])
    last = np.concatenate([first[1:], [True]])
    return RowSet(starts[first], reach[last])
