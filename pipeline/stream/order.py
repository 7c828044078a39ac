"""The order of rows as a pure function of (seed, epoch, position): no state, no reading.

Rule "parts". A bucket's rows, as they lie in the dataset, are one line, turned by a random offset in each epoch, so
that the rows left over at its end are other ones each time. The line is cut into equal tracks, many for each lane;
which lane gets which is drawn among neighbours. A window of a lane takes one part of each of its tracks, the parts of
a track in random turn, and its rows are shuffled. So the lanes' windows of a moment hold rows from every stretch of
the dataset, in its proportions: data that lie sorted by class are mixed, too. A track's turns stay within some
neighbouring parts, about a row group, before they go on to others: what is read once of a row group is soon needed
again.

Rule "row groups", of runs that began before there was the other: the row groups are permuted and laid end to end, and
each lane cuts an equal stretch of them into windows of whole row groups. What is not shuffled is laid out in this
way, too, in the order of the dataset.

Batches of the buckets are interleaved in proportion.

All randomness is the raw output of Philox4x64-10 (Salmon et al. 2011) under a hash of what is drawn. Only
the raw bits are used, as only those are promised to stay the same in every numpy version.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError, ConflictError

Ints = NDArray[np.int64]

PARTS, ROW_GROUPS = "parts", "row groups"  # the rules; a stream's state names the one that it was made by

# A part is a request to a remote store. With the stream's default settings, 8 lanes of windows of 64 MiB, a moment
# has 2,048 of the small parts: of rows sorted into 1,000 classes a batch of 1,024 then holds 0.98 of the distinct
# classes that independent draws hold. Where a shuffled compaction has mixed the rows, 128 large parts do as well.
PART_BYTES, MIXED_PART_BYTES = 256 << 10, 4 << 20
MOST_PARTS = 512


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

    bucket_of: index into `buckets`; rows: rows of the split being served; read_bytes: cost of reading it; stored:
    its rows of all splits, None where they are those served; mixed: rows that lie together come from all over.
    """

    buckets: tuple[str, ...]
    bucket_of: Ints
    rows: Ints
    read_bytes: Ints
    stored: Ints | None = None
    mixed: bool = False


@dataclass(frozen=True)
class OrderSpec:
    """The numbers that, with the data, decide the order."""

    seed: int
    batch_size: int
    lanes: int
    window_bytes: int
    shuffle: bool = True
    rule: str = PARTS


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of one row group, counted among the rows of the split."""

    row_group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Pieces that are read together and whose rows are shuffled together by `key` (None: kept in order)."""

    epoch: int
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
    """The windows of one lane in one epoch of one bucket, in the order in which they are served.

    first_rows: where each begins in the lane's stretch, and the end of the last; pieces: row groups, starts and stops
    of a window's pieces.
    """

    def __init__(
        self,
        epoch: int,
        bucket: int,
        first_rows: Ints,
        pieces: Callable[[int], tuple[Ints, Ints, Ints]],
        key: tuple[object, ...] | None,
    ):
        self._epoch, self._bucket, self._key, self._pieces = epoch, bucket, key, pieces
        self._first_rows: list[int] = first_rows.tolist()

    def __len__(self) -> int:
        return len(self._first_rows) - 1

    def __getitem__(self, index: int) -> Window:
        if not 0 <= index < len(self):  # else iterating would not end
            raise IndexError(index)
        pieces = tuple(Piece(*each) for each in zip(*(c.tolist() for c in self._pieces(index)), strict=True))
        first, last = self._first_rows[index], self._first_rows[index + 1]
        key = None if self._key is None else (*self._key, index)
        return Window(self._epoch, self._bucket, first, last - first, pieces, key)

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
            fewer = range(1, min(spec.batch_size, spec.lanes) + 1)
            near = max(each for each in fewer if spec.batch_size % each == 0)
            raise ConfigError(
                "the global batch cannot be cut evenly into lanes",
                key="lanes",
                value=spec.lanes,
                rule=f"lanes must divide batch_size={spec.batch_size}",
                next_step=f"use a divisor, such as {near}",
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
            if self.spec.rule == ROW_GROUPS:
                members = members[permutation(len(members), "row groups", *key)]
            offset = int(random_bits(1, "offset", *key)[0]) % int(self.bucket_rows[bucket])
        return members, np.concatenate([[0], np.cumsum(self.layout.rows[members])]), offset

    def windows(self, epoch: int, bucket: int, lane: int) -> LaneWindows:
        """The windows of a lane's stretch: batches x slot rows, in the order in which they are served."""
        if self.spec.shuffle and self.spec.rule == PARTS:
            return self._windows_of_parts(epoch, bucket, lane)
        groups, first_rows, offset = self._lines(epoch, bucket)
        length = int(self.batches[bucket]) * self.slot
        begin = (lane * length + offset) % int(first_rows[-1])
        pieces = _pieces(groups, first_rows, np.array([begin]), np.array([begin + length]))
        key = ("rows", self.spec.seed, epoch, self.layout.buckets[bucket], lane) if self.spec.shuffle else None
        cuts = _pack(self.layout.read_bytes[pieces[0]], self._budgets[bucket])

        def of_window(index: int) -> tuple[Ints, Ints, Ints]:
            own = slice(cuts[index], cuts[index + 1])
            return pieces[0][own], pieces[1][own], pieces[2][own]

        edges = np.concatenate([[0], np.cumsum(pieces[2] - pieces[1])])[cuts]
        return LaneWindows(epoch, bucket, edges, of_window, key)

    def _windows_of_parts(self, epoch: int, bucket: int, lane: int) -> LaneWindows:
        groups, first_rows, offset = self._lines(epoch, bucket)
        rows, lanes = int(self.batches[bucket]) * self.slot, self.spec.lanes
        key = (self.spec.seed, epoch, self.layout.buckets[bucket])
        most = max(1, self._budgets[bucket] // self._row_bytes(bucket))
        part_bytes = MIXED_PART_BYTES if self.layout.mixed else PART_BYTES
        tracks = max(1, min(MOST_PARTS, most, self._budgets[bucket] // part_bytes))
        # The line is `tracks` zones, each of a track for every lane; a lane's are together its rows, exactly.
        ends = np.arange(tracks + 1) * rows // tracks
        lengths = np.diff(ends)
        drawn = random_bits(tracks * lanes, "tracks", *key).reshape(tracks, lanes)
        begins = offset + lanes * ends[:-1] + np.argsort(drawn, axis=1, kind="stable")[:, lane] * lengths
        count = -(-rows // most)
        while True:
            near = -(-int(first_rows[-1]) * tracks * count // (rows * len(groups)))  # parts of about a row group
            turns = _turns(tracks, count, near, (*key, lane))
            starts = turns * lengths[:, None] // count
            sizes = (turns + 1) * lengths[:, None] // count - starts
            held = sizes.sum(axis=0)
            if (fullest := int(held.max())) <= most:
                break
            # Parts differ by a row, and chance may put many larger ones together. With more windows they are smaller.
            count = max(count + 1, -(-count * fullest // most))
        served = np.flatnonzero(held)

        def of_window(index: int) -> tuple[Ints, Ints, Ints]:
            at = served[index]
            start, size = begins + starts[:, at], sizes[:, at]
            return _pieces(groups, first_rows, start[size > 0], (start + size)[size > 0])

        edges = np.concatenate([[0], np.cumsum(held[served])])
        return LaneWindows(epoch, bucket, edges, of_window, ("rows", *key, lane))

    def _row_bytes(self, bucket: int) -> int:
        """Memory of a served row: all rows of a bucket are equally long, but those between them may be read, too."""
        layout, members = self.layout, self._members[bucket]
        stored = (layout.rows if layout.stored is None else layout.stored)[members]
        # A row group with rows that are no longer visible would seem to have longer ones.
        longest = int((-(-layout.read_bytes[members] // stored)).min())
        # See `StoredParts`: where more than every other row is passed over, those served are copied out.
        return max(1, min(2 * longest, longest * int(stored.sum()) // int(layout.rows[members].sum())))


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


def _turns(tracks: int, count: int, near: int, key: tuple[object, ...]) -> Ints:
    """The part of each track that each window takes, a run of `near` parts before the next: int64 [tracks, count]."""
    runs, low = -(-count // near), np.uint64((1 << 32) - 1)
    of_run = random_bits(tracks * runs, "runs", *key).reshape(tracks, runs)
    own = random_bits(tracks * count, "turns", *key).reshape(tracks, count)
    words = (np.repeat(of_run, near, axis=1)[:, :count] & ~low) | (own >> np.uint64(32))
    return np.argsort(words, axis=1, kind="stable")


def _pieces(groups: Ints, first_rows: Ints, begins: Ints, ends: Ints) -> tuple[Ints, Ints, Ints]:
    """Row groups, starts and stops that cover the spans [begin, end) of a line that goes on at its beginning."""
    rows = first_rows[-1]
    ends, begins = ends - begins // rows * rows, begins % rows
    over = ends > rows
    # A span that goes on at the beginning is two, one after the other.
    spans = np.stack([begins, np.minimum(ends, rows), np.zeros_like(begins), ends - rows], axis=1).reshape(-1, 2)
    spans = spans[np.stack([np.ones_like(over), over], axis=1).ravel()]
    low = np.searchsorted(first_rows, spans[:, 0], side="right") - 1
    counts = np.searchsorted(first_rows, spans[:, 1], side="left") - low
    at = np.repeat(low - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    starts = np.maximum(np.repeat(spans[:, 0], counts), first_rows[at]) - first_rows[at]
    stops = np.minimum(np.repeat(spans[:, 1], counts), first_rows[at + 1]) - first_rows[at]
    return groups[at], starts, stops


# -- The state of a stream: a step number, and what must be unchanged for that number to mean the same rows ----


VERSION = 2  # changes whenever the same settings give another order

ORDER_KEY = "order"  # the rule of the order in an identity; absent: row groups, or not shuffled at all

_NEXT = "resume with the data and settings the state was made with, or start a new run"


def rule_told(spec: OrderSpec) -> dict[str, str]:
    """What an identity tells of a rule: states of before there were two are of `ROW_GROUPS` and tell nothing."""
    return {ORDER_KEY: spec.rule} if spec.shuffle and spec.rule != ROW_GROUPS else {}


def rule_in(state: Mapping[str, Any], prefix: str = "") -> str:
    """The rule by which a state, or an identity whose keys begin so, was made; one of a newer release is refused."""
    rule = str(state.get(f"{prefix}{ORDER_KEY}", ROW_GROUPS))
    if rule not in (PARTS, ROW_GROUPS):
        raise ConflictError(
            "the stream's state was made by another rule",
            key=ORDER_KEY,
            value=rule,
            rule=f"this release knows {PARTS!r} and {ROW_GROUPS!r}",
            next_step="resume with the release that wrote it, or start a new run",
        )
    return rule


def make_state(step: int, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The state from which a stream goes on at `step`, the number of global batches already consumed."""
    return {"version": VERSION, "step": int(step), **identity}


def check_state(state: Mapping[str, Any], identity: Mapping[str, Any]) -> int:
    """The step to go on from; raises ConflictError that names every field that differs."""
    version = state.get("version")
    if version != VERSION:
        raise ConflictError(
            "the stream's state has another version",
            key="version",
            value=version,
            rule=f"this release reads version {VERSION}",
            next_step="resume with the release that wrote it, or start a new run",
        )
    differing = [
        f"{key}: {state.get(key, '(absent)')} in the state, {identity.get(key, '(absent)')} now"
        for key in sorted({*state, *identity} - {"version", "step"})
        if key not in state or key not in identity or state[key] != identity[key]
    ]
    if differing:
        raise ConflictError(
            "the state belongs to another sequence of batches", rule="; ".join(differing), next_step=_NEXT
        )
    step = state.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ConflictError(
            "the stream's state has no usable step",
            key="step",
            value=step,
            rule="a whole number from 0 on",
            next_step=_NEXT,
        )
    return step
