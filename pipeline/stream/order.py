"""The order of rows as a pure function of (seed, epoch, position): no state, no reading.

Per epoch and bucket the row groups are permuted and laid end to end; the line of rows is turned by a random
offset, so that the rows left over at its end differ from epoch to epoch, and cut into one equal stretch per
lane. A lane cuts its stretch, at row-group borders, into windows that fit its share of the memory; rows are
shuffled within a window. Batches of the buckets are interleaved in proportion. Row groups may have any
size: a stretch begins and ends in the middle of one where it must.

All randomness is the raw output of Philox4x64-10 (Salmon et al. 2011) under a hash of what is drawn. Only
the raw bits are used, as only those are promised to stay the same in every numpy version.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError

Ints = NDArray[np.int64]


def random_bits(count: int, *key: object) -> NDArray[np.uint64]:
    """`count` uniform 64-bit words that depend on nothing but the key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    words: Any = np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw(count)
    return np.asarray(words, dtype=np.uint64)


def permutation(count: int, *key: object) -> Ints:
    """A bijection of range(count) that depends on nothing but the key: int64 [count].

    Each index is put below random bits and the words are sorted: as no two are equal, every way of sorting
    gives the same result, and sorting words is ten times as fast as a stable sort of indices.
    """
    below = np.uint64((1 << max(1, count - 1).bit_length()) - 1)
    words = random_bits(count, *key) & ~below | np.arange(count, dtype=np.uint64)
    words.sort()
    return (words & below).astype(np.int64)


@dataclass(frozen=True)
class Layout:
    """What the order needs to know of a dataset, one entry per row group.

    bucket_of: index into `buckets`; rows: rows of the split being served; read_bytes: cost of reading it.
    """

    buckets: tuple[str, ...]
    bucket_of: Ints
    rows: Ints
    read_bytes: Ints


@dataclass(frozen=True)
class OrderSpec:
    """The numbers that, with the data, decide the order."""

    seed: int
    batch_size: int
    lanes: int
    window_bytes: int
    shuffle: bool = True


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of one row group, counted among the rows of the split."""

    row_group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Pieces that are read together and whose rows are shuffled together by `key` (None: kept in order)."""

    bucket: int
    first_row: int  # of the lane's stretch
    num_rows: int
    pieces: tuple[Piece, ...]
    key: tuple[object, ...] | None

    def permutation(self) -> Ints:
        """The row of the laid-out pieces that is served at each place: int64 [num_rows]."""
        if self.key is None:
            return np.arange(self.num_rows, dtype=np.int64)
        return permutation(self.num_rows, *self.key)


class LaneWindows:
    """The windows of one lane in one epoch of one bucket, in the order in which they are served."""

    def __init__(
        self, bucket: int, pieces: tuple[Ints, Ints, Ints], costs: Ints, budget: int, key: tuple[object, ...] | None
    ):
        self._bucket, self._key = bucket, key
        self._groups, self._starts, self._stops = pieces
        rows = np.concatenate([[0], np.cumsum(self._stops - self._starts)])
        self._cuts = _pack(costs, budget)
        self._first_rows: list[int] = rows[self._cuts].tolist()

    def __len__(self) -> int:
        return len(self._cuts) - 1

    def __getitem__(self, index: int) -> Window:
        begin, end = self._cuts[index], self._cuts[index + 1]
        columns = (self._groups[begin:end], self._starts[begin:end], self._stops[begin:end])
        pieces = tuple(Piece(*each) for each in zip(*(column.tolist() for column in columns), strict=True))
        first, last = self._first_rows[index], self._first_rows[index + 1]
        return Window(self._bucket, first, last - first, pieces, None if self._key is None else (*self._key, index))

    def find(self, row: int) -> int:
        """The index of the window that holds this row of the lane."""
        return bisect_right(self._first_rows, row) - 1


def _pack(costs: Ints, budget: int) -> list[int]:
    """Cut neighbours greedily into groups that cost at most the budget; no entry costs more than it."""
    before: list[int] = np.concatenate([[0], np.cumsum(costs)]).tolist()
    cuts = [0]
    while cuts[-1] < len(costs):
        cuts.append(bisect_right(before, before[cuts[-1]] + budget) - 1)
    return cuts


class Order:
    """Which rows make which batch; the same object for every rank.

    Raises ConfigError when the numbers cannot work together or the data give no batch at all.
    """

    def __init__(self, layout: Layout, spec: OrderSpec) -> None:
        self.layout, self.spec = layout, spec
        if spec.batch_size % spec.lanes:
            raise ConfigError(
                "the global batch cannot be cut evenly into lanes",
                key="lanes",
                value=spec.lanes,
                rule=f"lanes must divide batch_size={spec.batch_size}",
                next_step=f"use a divisor, such as {_divisor_near(spec.batch_size, spec.lanes)}",
            )
        self.slot = spec.batch_size // spec.lanes
        count = len(layout.buckets)
        self.bucket_rows = _bucket_rows(layout)
        self.batches: Ints = self.bucket_rows // spec.batch_size
        self.steps_per_epoch = int(self.batches.sum())
        if not self.steps_per_epoch:
            largest = int(self.bucket_rows.max(initial=0))
            raise ConfigError(
                "the data do not fill a single batch",
                key="batch_size",
                value=spec.batch_size,
                rule=f"some bucket must hold a whole batch of rows; the largest here holds {largest}",
                next_step="use a smaller batch, or more data",
            )
        self._members = [np.flatnonzero((layout.bucket_of == bucket) & (layout.rows > 0)) for bucket in range(count)]
        self._budgets = self._lane_budgets()
        self._lines = lru_cache(maxsize=2 * count)(self._line)
        self.schedule = lru_cache(maxsize=2)(self._schedule)

    def _lane_budgets(self) -> list[int]:
        """Bytes of one window of one lane, per bucket: a row group at least, the rest by the bucket's size."""
        spec, served, count = self.spec, self.batches > 0, np.count_nonzero(self.batches)
        largest, totals = _costs(self.layout, served)
        spare = spec.window_bytes // (2 * spec.lanes) - sum(largest)
        if spare < 0:
            raise ConfigError(
                "the shuffling windows do not fit their memory",
                key="window_bytes",
                value=spec.window_bytes,
                rule=f"{spec.lanes} lanes x {count} buckets x 2 windows of at least the largest row group",
                next_step=f"allow {2 * spec.lanes * sum(largest)} bytes (all workers together), or use fewer lanes",
            )
        whole = max(1, sum(totals))
        return [least + spare * total // whole for least, total in zip(largest, totals, strict=True)]

    def _schedule(self, epoch: int) -> NDArray[np.int16]:
        """The bucket of every step of an epoch: int16 [steps_per_epoch].

        The j-th of a bucket's m batches comes at time (j + u) / m, with u uniform in [0, 1): a random
        interleaving in which no bucket ever runs ahead of its share by more than a batch of each.
        """
        if np.count_nonzero(self.batches) == 1:
            return np.full(self.steps_per_epoch, int(np.argmax(self.batches)), dtype=np.int16)
        times = []
        for name, count in zip(self.layout.buckets, self.batches.tolist(), strict=True):
            jitter: Any = 0.5
            if self.spec.shuffle:
                bits = random_bits(count, "schedule", self.spec.seed, epoch, name)
                jitter = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
            times.append((np.arange(count) + jitter) / max(1, count))
        buckets = np.repeat(np.arange(len(self.batches), dtype=np.int16), self.batches)
        return buckets[np.argsort(np.concatenate(times), kind="stable")]

    def steps_from(self, step: int) -> Iterator[tuple[int, int, int]]:
        """(step, epoch, bucket) for every step from this one on, without end."""
        epoch, position = divmod(step, self.steps_per_epoch)
        while True:
            for bucket in self.schedule(epoch)[position:].tolist():
                yield step, epoch, bucket
                step += 1
            epoch, position = epoch + 1, 0

    def served_before(self, step: int) -> tuple[int, Ints]:
        """The epoch of a step, and the batches of each bucket that this epoch serves before it."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return epoch, np.bincount(self.schedule(epoch)[:position], minlength=len(self.batches))

    def _line(self, epoch: int, bucket: int) -> tuple[Ints, Ints, int]:
        """A bucket's row groups laid end to end: row groups [m], first rows [m + 1], where the line begins."""
        members, key = self._members[bucket], (self.spec.seed, epoch, self.layout.buckets[bucket])
        offset = 0
        if self.spec.shuffle:
            members = members[permutation(len(members), "row groups", *key)]
            offset = int(random_bits(1, "offset", *key)[0]) % int(self.bucket_rows[bucket])
        return members, np.concatenate([[0], np.cumsum(self.layout.rows[members])]), offset

    def windows(self, epoch: int, bucket: int, lane: int) -> LaneWindows:
        """The windows of a lane's stretch: batches x slot rows, in the order in which they are served."""
        groups, first_rows, offset = self._lines(epoch, bucket)
        rows, length = int(first_rows[-1]), int(self.batches[bucket]) * self.slot
        begin = (lane * length + offset) % rows
        spans = [(begin, min(begin + length, rows))]
        if begin + length > rows:
            spans.append((0, begin + length - rows))
        parts = [_pieces(groups, first_rows, *span) for span in spans]
        pieces = tuple(np.concatenate(column) for column in zip(*parts, strict=True))
        key = ("rows", self.spec.seed, epoch, self.layout.buckets[bucket], lane) if self.spec.shuffle else None
        costs = self.layout.read_bytes[pieces[0]]
        return LaneWindows(bucket, (pieces[0], pieces[1], pieces[2]), costs, self._budgets[bucket], key)


def least_window_bytes(layout: Layout, batch_size: int, lanes: int) -> int:
    """The least `window_bytes` of an order: for each lane and bucket served, two windows of a row group."""
    return 2 * lanes * sum(_costs(layout, _bucket_rows(layout) >= batch_size)[0])


def _bucket_rows(layout: Layout) -> Ints:
    """Rows of each bucket: int64 [buckets]."""
    rows = np.zeros(len(layout.buckets), dtype=np.int64)
    np.add.at(rows, layout.bucket_of, layout.rows)
    return rows


def _costs(layout: Layout, served: NDArray[np.bool_]) -> tuple[list[int], list[int]]:
    """Bytes of each bucket's largest row group and of all of them; 0 for a bucket that is not served."""
    largest, totals = np.zeros(len(served), np.int64), np.zeros(len(served), np.int64)
    used = (layout.rows > 0) & served[layout.bucket_of]
    np.maximum.at(largest, layout.bucket_of[used], layout.read_bytes[used])
    np.add.at(totals, layout.bucket_of[used], layout.read_bytes[used])
    return largest.tolist(), totals.tolist()


def _pieces(groups: Ints, first_rows: Ints, begin: int, end: int) -> tuple[Ints, Ints, Ints]:
    """Row groups, starts and stops that cover rows [begin, end) of a line."""
    low = int(np.searchsorted(first_rows, begin, side="right")) - 1
    high = int(np.searchsorted(first_rows, end, side="left"))
    origin = first_rows[low:high]
    starts = np.maximum(begin - origin, 0)
    stops = np.minimum(end, first_rows[low + 1 : high + 1]) - origin
    return groups[low:high], starts, stops


def _divisor_near(number: int, wanted: int) -> int:
    return max(each for each in range(1, min(number, wanted) + 1) if number % each == 0)
