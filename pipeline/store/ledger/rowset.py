"""Sets of row addresses (unit, row): long runs as intervals, scattered rows as bitmaps; all operations vectorised."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint64]

# A row address is one integer: unit in the upper half, row in the lower. A stop of MAX_ROWS means "to the end".
_SHIFT = 32
MAX_ROWS = 1 << 31
# A block of addresses in which more runs begin than this is a bitmap, which then takes less room than they do.
_BLOCK_SHIFT = 9
BLOCK_ROWS = 1 << _BLOCK_SHIFT
_WORDS = BLOCK_ROWS // 64
_MOST_RUNS = 4
_CHUNK = 1 << 13  # blocks that are spread out to a byte a row at a time
_FULL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


Units = TypeVar("Units", int, Int64s)


def address(unit: Units) -> Units:
    """The address integer of row 0 of a unit, or of many; that of row r is r more."""
    return unit << _SHIFT


def unit_of(key: Units) -> Units:
    """The unit of an address integer, or of many."""
    return key >> _SHIFT


_RULE = "row addresses must have 0 <= unit < 2^31 and 0 <= start <= stop <= 2^31"


def check_addresses(starts: Int64s, stops: Int64s, blocks: Int64s) -> None:
    """ValueError for intervals or blocks of addresses that no unit has."""
    least = min(starts.min(initial=0), blocks.min(initial=0))
    last = max(int(stops.max(initial=0)) >> _SHIFT, int(blocks.max(initial=0)) >> (_SHIFT - _BLOCK_SHIFT))
    if least < 0 or last >= MAX_ROWS or (stops < starts).any():
        raise ValueError(_RULE)


@dataclass(frozen=True, eq=False)
class RowSet:
    """An immutable set of row addresses, in a form that follows from its rows alone.

    A block of BLOCK_ROWS addresses that holds more than a few runs is a bitmap: `blocks`, int64 [k] ascending, are
    their numbers (address // BLOCK_ROWS), `bits`, uint64 [k, 8], their rows, the lowest bit of the first word first.
    All other rows are intervals: `starts` and `stops`, int64 [n], are sorted, disjoint and never touch. A third of a
    billion rows, chosen by chance, takes 0.15 GB.
    """

    starts: Int64s
    stops: Int64s
    blocks: Int64s
    bits: Bits

    @staticmethod
    def empty() -> RowSet:
        """The empty set."""
        return _EMPTY

    @staticmethod
    def from_triples(triples: Iterable[Sequence[int]]) -> RowSet:
        """From (unit, start, stop) triples in any order, overlapping or not; ValueError as `from_arrays`."""
        rows = np.array(list(triples), np.int64).reshape(-1, 3)
        return RowSet.from_arrays(rows[:, 0], rows[:, 1], rows[:, 2])

    def to_json(self) -> Any:
        """[[unit, start, stop], ...]; with bitmaps {"spans": those of the rest, "blocks": [[unit, first row], ...],
        "bits": 64 bytes a block in base64, the row that comes first in the lowest bit of the first byte}.
        """
        if not len(self.blocks):
            return self.triples()
        first = self.blocks * BLOCK_ROWS
        spans = RowSet(self.starts, self.stops, self.blocks[:0], self.bits[:0])
        return {
            "spans": spans.triples(),
            "blocks": np.stack([first >> _SHIFT, first & (2 * MAX_ROWS - 1)], axis=1).tolist(),
            "bits": base64.b64encode(self.bits.astype("<u8").tobytes()).decode(),
        }

    @staticmethod
    def from_json(body: Any) -> RowSet:
        """What `to_json` gave; ValueError, KeyError or TypeError for anything else."""
        if isinstance(body, list):
            return RowSet.from_triples(body)
        spans, first = RowSet.from_triples(body["spans"]), np.array(body["blocks"], np.int64).reshape(-1, 2)
        packed = np.frombuffer(base64.b64decode(body["bits"], validate=True), "<u8")
        bits = packed.astype(np.uint64).reshape(len(first), -1)
        if (first[:, 1] % BLOCK_ROWS).any() or (first < 0).any() or (first >= MAX_ROWS).any() or len(bits.T) != 8:
            raise ValueError("a block of rows is none")
        blocks = ((first[:, 0] << _SHIFT) + first[:, 1]) // BLOCK_ROWS
        return RowSet.from_parts(spans.starts, spans.stops, blocks, bits)

    @staticmethod
    def from_arrays(units: Int64s, starts: Int64s, stops: Int64s) -> RowSet:
        """From parallel arrays of units, first rows and stop rows; ValueError for rows outside [0, 2^31]."""
        if len(units) and (units.min() < 0 or starts.min() < 0 or stops.max() > MAX_ROWS or units.max() >= MAX_ROWS):
            raise ValueError(_RULE)
        base = units.astype(np.int64) << _SHIFT
        return _canonical(base + starts, base + stops)

    @staticmethod
    def from_keys(starts: Int64s, stops: Int64s) -> RowSet:
        """From half-open intervals of address integers."""
        return _canonical(starts, stops)

    @staticmethod
    def from_rows(units: Int64s, rows: Int64s) -> RowSet:
        """From single addresses, in any order, repeated or not."""
        return RowSet.from_arrays(units, rows, rows + 1)

    @staticmethod
    def from_parts(starts: Int64s, stops: Int64s, blocks: Int64s, bits: Bits) -> RowSet:
        """From the arrays of several sets, laid end to end: their union. ValueError for addresses that cannot be."""
        check_addresses(starts, stops, blocks)
        return _canonical(starts, stops, blocks, bits)

    @staticmethod
    def union_all(sets: Sequence[RowSet]) -> RowSet:
        """The union of many sets at the cost of one sort."""
        if len(sets) == 1:
            return sets[0]
        columns = zip(*((s.starts, s.stops, s.blocks, s.bits) for s in sets), strict=True)
        return _canonical(*(np.concatenate(column) for column in columns)) if sets else _EMPTY

    def spans(self) -> Iterator[tuple[Int64s, Int64s]]:
        """All its rows as maximal intervals (starts, stops) of addresses in order, a million or so at a time."""
        cuts = [*range(_CHUNK, len(self.blocks), _CHUNK), len(self.blocks)]
        first, begun = 0, 0
        waiting: Int64s = np.zeros(0, np.int64)  # an interval that ends where the next chunk may go on
        waiting_stop = waiting
        for cut in cuts:
            end = int(self.blocks[cut]) << _BLOCK_SHIFT if cut < len(self.blocks) else None
            last = len(self.starts) if end is None else int(np.searchsorted(self.starts, end))
            near = _runs_of(self.blocks[begun:cut], self.bits[begun:cut])
            starts, stops = _merged(
                np.concatenate([waiting, self.starts[first:last], near[0]]),
                np.concatenate([waiting_stop, self.stops[first:last], near[1]]),
            )
            first, begun = last, cut
            keep = len(starts) if end is None else max(0, len(starts) - 1)
            waiting, waiting_stop = starts[keep:], stops[keep:]
            if keep:
                yield starts[:keep], stops[:keep]

    def iter_triples(self) -> Iterator[list[int]]:
        """[unit, start, stop] in address order."""
        for starts, stops in self.spans():
            units = starts >> _SHIFT
            base = units << _SHIFT
            yield from np.stack([units, starts - base, stops - base], axis=1).tolist()

    def triples(self) -> list[list[int]]:
        """[[unit, start, stop], ...] in address order."""
        return list(self.iter_triples())

    def sql(self) -> str:
        """A condition on the columns unit and row that is true for its rows; the set has some."""
        return " OR ".join(
            f'("unit" = {unit} AND "row" >= {start} AND "row" < {stop})' for unit, start, stop in self.triples()
        )

    def count(self) -> int:
        """The number of rows."""
        return int((self.stops - self.starts).sum()) + int(np.bitwise_count(self.bits).sum(dtype=np.int64))

    def count_by_unit(self, units: int) -> Int64s:
        """How many of its rows each unit below `units` has: int64 [units]."""
        counts = np.zeros(units, np.int64)
        np.add.at(counts, self.starts >> _SHIFT, self.stops - self.starts)
        in_blocks = np.bitwise_count(self.bits).sum(axis=1, dtype=np.int64)
        np.add.at(counts, self.blocks >> (_SHIFT - _BLOCK_SHIFT), in_blocks)
        return counts

    def num_spans(self) -> int:
        """Of how many intervals it would consist at most if it had no bitmaps."""
        return len(self.starts) + int(_num_runs(self.bits).sum())

    def units(self) -> Int64s:
        """The distinct units, ascending."""
        return distinct(np.concatenate([self.starts >> _SHIFT, self.blocks >> (_SHIFT - _BLOCK_SHIFT)]))

    def of_unit(self, unit: int) -> list[tuple[int, int]]:
        """The (start, stop) intervals of one unit."""
        inside = self.within(unit << _SHIFT, (unit + 1) << _SHIFT)
        return [(start, stop) for _, start, stop in inside.triples()]

    def within(self, start: int, stop: int) -> RowSet:
        """Its rows with start <= address < stop; the cost is that of the rows found."""
        if start >= stop:
            return _EMPTY
        low = int(np.searchsorted(self.stops, start, side="right"))
        high = int(np.searchsorted(self.starts, stop, side="left"))
        first, last = np.searchsorted(self.blocks, [start >> _BLOCK_SHIFT, -(-stop >> _BLOCK_SHIFT)]).tolist()
        starts, stops = self.starts[low:high].clip(min=start), self.stops[low:high].clip(max=stop)
        blocks, bits = self.blocks[first:last], self.bits[first:last]
        found = RowSet(starts, stops, blocks, bits)
        if len(blocks) and (blocks[0] << _BLOCK_SHIFT < start or (blocks[-1] + 1) << _BLOCK_SHIFT > stop):
            return found & RowSet(np.array([start]), np.array([stop]), _EMPTY.blocks, _EMPTY.bits)
        return found

    def touches(self, starts: Int64s, stops: Int64s) -> npt.NDArray[np.bool_]:
        """Whether it has a row in each interval [start, stop) of addresses, both at ends of units: bool [n]."""
        begun = np.searchsorted(self.starts, stops, side="left")
        ended = np.searchsorted(self.stops, starts, side="right")
        first = np.searchsorted(self.blocks, starts >> _BLOCK_SHIFT, side="left")
        last = np.searchsorted(self.blocks, -(-stops >> _BLOCK_SHIFT), side="left")
        return np.asarray((begun > ended) | (last > first))

    def contains(self, units: Int64s, rows: Int64s) -> npt.NDArray[np.bool_]:
        """Elementwise membership."""
        return self.covers((units.astype(np.int64) << _SHIFT) + rows)

    def covers(self, keys: Int64s) -> npt.NDArray[np.bool_]:
        """Elementwise membership of address integers."""
        inside = np.asarray(_in_spans(self.starts, self.stops, keys))
        if len(self.blocks):
            place = np.searchsorted(self.blocks, keys >> _BLOCK_SHIFT).clip(max=len(self.blocks) - 1)
            row = keys & (BLOCK_ROWS - 1)
            bit = self.bits[place, row >> 6] >> (row & 63).astype(np.uint64) & np.uint64(1)
            inside |= (self.blocks[place] == keys >> _BLOCK_SHIFT) & bit.astype(np.bool_)
        return inside

    def __bool__(self) -> bool:
        return len(self.starts) + len(self.blocks) > 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RowSet):
            return NotImplemented
        mine, theirs = (vars(each).values() for each in (self, other))
        return all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __or__(self, other: RowSet) -> RowSet:
        return RowSet.union_all([self, other])

    def __and__(self, other: RowSet) -> RowSet:
        return self._combine(other, np.bitwise_and, keep_other=True) if self and other else _EMPTY

    def __sub__(self, other: RowSet) -> RowSet:
        return self._combine(other, lambda a, b: a & ~b, keep_other=False) if self and other else self

    def _combine(self, other: RowSet, bitwise: Callable[[Bits, Bits], Bits], keep_other: bool) -> RowSet:
        blocks = distinct(np.concatenate([self.blocks, other.blocks])) if len(other.blocks) else self.blocks
        bits = bitwise(self._bits_of(blocks), other._bits_of(blocks)) if len(blocks) else _EMPTY.bits
        mine = _outside(self.starts, self.stops, blocks)
        theirs = _outside(other.starts, other.stops, blocks)
        # Cut the line at every boundary: inside one elementary segment membership does not change.
        cuts = distinct(np.concatenate([*mine, *theirs]))
        left, right = cuts[:-1], cuts[1:]
        keep = _in_spans(*mine, left) & (_in_spans(*theirs, left) == keep_other)
        return _canonical(left[keep], right[keep], blocks, bits)

    def _bits_of(self, blocks: Int64s) -> Bits:
        """Its rows in some blocks, which include its own, ascending: uint64 [k, 8]."""
        bits = _bits_of(self.starts, self.stops, blocks)
        bits[np.searchsorted(blocks, self.blocks)] = self.bits
        return bits


_NONE = np.zeros(0, np.int64)
_EMPTY = RowSet(_NONE, _NONE, _NONE, np.zeros((0, _WORDS), np.uint64))


def _canonical(starts: Int64s, stops: Int64s, blocks: Int64s = _NONE, bits: Bits = _EMPTY.bits) -> RowSet:
    """The set of some intervals and bitmaps, in any order, repeated or overlapping."""
    starts, stops = _merged(starts, stops)
    if len(blocks) and not (blocks[1:] > blocks[:-1]).all():
        order = np.argsort(blocks, kind="stable")
        blocks, bits = blocks[order], bits[order]
        first = np.flatnonzero(np.concatenate([[True], blocks[1:] != blocks[:-1]]))
        blocks, bits = blocks[first], np.bitwise_or.reduceat(bits, first, axis=0)
    # An interval that ends in the block in which the last of the next few begins is one of too many there.
    crowded = ((stops - 1) >> _BLOCK_SHIFT)[:-_MOST_RUNS] == (starts >> _BLOCK_SHIFT)[_MOST_RUNS:]
    if not len(blocks) and not crowded.any():
        return RowSet(starts, stops, _NONE, _EMPTY.bits)
    dense = distinct(np.concatenate([blocks, (starts >> _BLOCK_SHIFT)[_MOST_RUNS:][crowded]]))
    words = _bits_of(starts, stops, dense)
    words[np.searchsorted(dense, blocks)] |= bits
    starts, stops = _outside(starts, stops, dense)
    sparse = _num_runs(words) <= _MOST_RUNS
    if sparse.any():
        runs = _runs_of(dense[sparse], words[sparse])
        starts, stops = _merged(np.concatenate([starts, runs[0]]), np.concatenate([stops, runs[1]]))
        dense, words = dense[~sparse], words[~sparse]
    return RowSet(starts, stops, dense, words)


def distinct(values: Int64s) -> Int64s:
    """The distinct values, ascending; many times as fast as numpy's own way of millions of them, which hashes."""
    if len(values) and not (values[1:] > values[:-1]).all():
        values = np.sort(values)
        values = values[np.concatenate([[True], values[1:] != values[:-1]])]
    return values


def _merged(starts: Int64s, stops: Int64s) -> tuple[Int64s, Int64s]:
    """Intervals in any order, overlapping or not, as the maximal ones."""
    if not ((stops > starts).all() and (starts[1:] > stops[:-1]).all()):
        keep = stops > starts
        starts, stops = starts[keep], stops[keep]
        if len(starts):
            order = np.argsort(starts, kind="stable")
            starts, stops = starts[order], stops[order]
            reach = np.maximum.accumulate(stops)
            first = np.concatenate([[True], starts[1:] > reach[:-1]])
            starts, stops = starts[first], reach[np.concatenate([first[1:], [True]])]
    return starts, stops


def _in_spans(starts: Int64s, stops: Int64s, keys: Int64s) -> npt.NDArray[np.bool_]:
    return np.searchsorted(starts, keys, side="right") > np.searchsorted(stops, keys, side="right")


def _outside(starts: Int64s, stops: Int64s, blocks: Int64s) -> tuple[Int64s, Int64s]:
    """What is left of sorted, disjoint intervals outside of some blocks, ascending."""
    if not len(starts) or not len(blocks):
        return starts, stops
    first, last = (np.searchsorted(blocks, key >> _BLOCK_SHIFT, side="left") for key in (starts, stops - 1))
    near = blocks[first.clip(max=len(blocks) - 1)]
    within = (first == last) & (near == (stops - 1) >> _BLOCK_SHIFT) & (near == starts >> _BLOCK_SHIFT)
    starts, stops = starts[~within], stops[~within]
    cuts = distinct(np.concatenate([starts, stops, blocks << _BLOCK_SHIFT, (blocks + 1) << _BLOCK_SHIFT]))
    left = cuts[:-1]
    near = blocks[np.searchsorted(blocks, left >> _BLOCK_SHIFT).clip(max=len(blocks) - 1)]
    keep = _in_spans(starts, stops, left) & (near != left >> _BLOCK_SHIFT)
    return _merged(left[keep], cuts[1:][keep])


def _bits_of(starts: Int64s, stops: Int64s, blocks: Int64s) -> Bits:
    """The rows of sorted, disjoint intervals in some blocks, ascending: uint64 [k, 8]."""
    bits = np.zeros((len(blocks), _WORDS), np.uint64)
    if not len(starts):
        return bits
    low, high = blocks << _BLOCK_SHIFT, (blocks + 1) << _BLOCK_SHIFT
    # The intervals [first, last) reach into a block.
    first, last = np.searchsorted(stops, low, side="right"), np.searchsorted(starts, high, side="left")
    at = first.clip(max=len(starts) - 1)
    whole = (last > first) & (starts[at] <= low) & (stops[at] >= high)
    bits[whole] = _FULL
    parts = np.flatnonzero((last > first) & ~whole)
    for begin in range(0, len(parts), _CHUNK):
        some = parts[begin : begin + _CHUNK]
        number = last[some] - first[some]
        line = np.repeat(np.arange(len(some)), number)
        span = np.arange(len(line)) + np.repeat(first[some] - np.cumsum(number) + number, number)
        edge = np.zeros((len(some), BLOCK_ROWS + 1), np.int8)
        edge[line, (starts[span] - low[some][line]).clip(min=0)] += 1
        edge[line, (stops[span] - low[some][line]).clip(max=BLOCK_ROWS)] -= 1
        inside = np.cumsum(edge[:, :BLOCK_ROWS], axis=1, dtype=np.int8).view(np.bool_)
        bits[some] = np.packbits(inside, axis=1, bitorder="little").view("<u8")
    return bits


def _num_runs(bits: Bits) -> Int64s:
    """How many runs of set bits each block has: int64 [k]."""
    before = bits << np.uint64(1)
    before[:, 1:] |= bits[:, :-1] >> np.uint64(63)
    return np.asarray(np.bitwise_count(bits & ~before).sum(axis=1, dtype=np.int64))


def _runs_of(blocks: Int64s, bits: Bits) -> tuple[Int64s, Int64s]:
    """The runs of some blocks, ascending, as intervals that end at the ends of their blocks."""
    starts, stops = [_NONE], [_NONE]
    for begin in range(0, len(blocks), _CHUNK):
        some = bits[begin : begin + _CHUNK]
        edge = np.zeros((len(some), BLOCK_ROWS + 2), np.int8)
        edge[:, 1:-1] = np.unpackbits(some.astype("<u8").view(np.uint8), axis=1, bitorder="little")
        change = np.diff(edge, axis=1)
        base = blocks[begin : begin + _CHUNK] << _BLOCK_SHIFT
        for sign, found in ((1, starts), (-1, stops)):
            line, row = np.nonzero(change == sign)
            found.append(base[line] + row)
    return np.concatenate(starts), np.concatenate(stops)
