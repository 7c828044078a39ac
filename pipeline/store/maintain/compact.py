"""Compaction: fragments in the order of arrival become shards, in unit order or shuffled, by ordinary commit records.

The plan and the mean size of a settled row decide which rows a shard holds, so shards do not depend on how the encode
job was scheduled. The mean counts in steps of a seventh to a quarter: the little by which it moves when images come
in leaves the shards that are there as they are, but for the rare time that it passes a step, and all are made anew.
A shard's record has a newer generation than its fragments', so its rows take their place at once, shard by shard.
Fragments stay in storage until garbage collection is asked for.

In unit order shards begin and end with a unit, but for a unit too large for one: it is cut into equal parts.

Shuffled, the rows are mixed in pools. A pool is what one version of the plan has added, the first listing say, or a
night's; versions that would not fill a shard are taken together until they do. Its n shards, each more than half of
the size asked for, are dealt from its rows in plan order: of each of 64 equal stretches every shard gets one of n
equal parts, which one is drawn by the seed. Within a shard the rows of a bucket are then mixed throughout. So

- a shard holds rows from 64 places, evenly spread over all of its pool, whatever the size of the dataset; at each it
  holds a 64th of a shard, of neighbours;
- what comes later is mixed among itself, and leaves the shards of full pools as they are. Only that of the last
  pool, until it is full, is made anew with what joins it;
- nothing but the shard at hand is in memory. A process reads the latents of a row group as a whole when it first
  needs some of them, which checks them, and later their parts. What is small (keys, captions, labels) is read once
  for every shard with rows of its row group.

Shards are written in any order, by whoever the caller spreads them over: each commits its own.

A claim tells how its compaction arranges rows: a file that another one wrote is no shard of this one.

What else the fragments' records tell, why rows were left out and how long units are, is told anew as well, by one
record for a range of units where more than a few tell it: then nothing of the fragments counts any more, and the next
claim lists none of their records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store.ledger.generation import ARRANGED, IN_UNITS, Generation, arrangement, check_newest
from pipeline.store.ledger.identity import read_identity
from pipeline.store.ledger.ledger import Lengths, extents
from pipeline.store.ledger.rowset import RowSet, address, unit_of
from pipeline.store.ledger.state import State, read_state
from pipeline.store.maintain import Spread, in_turn
from pipeline.store.read.dataset import Dataset
from pipeline.store.read.pages import StoredParts, ValuePlaces
from pipeline.store.read.row_groups import reading_table
from pipeline.store.schema import LATENTS, REJECTS, keyed_words
from pipeline.store.writer import ROW_BYTES, Committer, file_meta

# Where rows are small, as where pictures lie in files of their own: texts of 16 KiB each still fit 32-bit offsets.
_MAX_ROWS = 1 << 16
# Of a shuffled shard. Each is a span in the shard's commit record, which is read whenever the dataset is opened.
_STRETCHES = 64
# Of what is told beside stored rows: more than so many records a range are too many.
_ROWS_A_RANGE, _UNITS_A_RANGE, _FEW_TELL = 1 << 18, 1 << 16, 8

Ints = npt.NDArray[np.int64]
Span = tuple[int, int]  # half-open, of address integers as a RowSet holds them


@dataclass(frozen=True)
class CompactReport:
    """What a compaction did."""

    shards_written: int
    shards_kept: int
    rows_moved: int
    bytes_written: int
    ranges_told: int = 0  # of units, whose outcomes and lengths one record tells now


def arranged(seed: int | None) -> dict[str, str]:
    """What the claim of a compaction notes: that it shuffles by a seed, or, of None, keeps to unit order."""
    return {ARRANGED: IN_UNITS if seed is None else f"shuffled {seed}"}


def compact(
    generation: Generation,
    *,
    shard_bytes: int,
    row_group_bytes: int,
    seed: int | None = None,
    spread: Spread = in_turn,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
) -> CompactReport:
    """Rewrite what is not yet in full shards, under a generation that holds the dataset; a second call does nothing.

    seed: rows are shuffled by it, and the claim notes so (`arranged`); None: they are in unit order. ConflictError
    when another run takes over, ValueError for another note in it. Memory: about three shards of whoever writes one.
    """
    root = generation.root
    if (noted := generation.claim.get(ARRANGED, IN_UNITS)) != arranged(seed)[ARRANGED]:
        raise ValueError(f"the claim notes {noted!r} where {arranged(seed)[ARRANGED]!r} is to be written")
    identity = read_identity(root)
    dataset = Dataset(root, identity, read_state(root))
    shards, todo = shards_to_write(dataset, shard_bytes, seed)
    committer = Committer(
        root,
        generation.number,
        row_group_bytes,
        identity.fingerprint.get("latent_dtype"),
        file_meta(identity, generation.number),
        seed,
    )
    written = moved = size_bytes = 0
    for done, (rows, size) in enumerate(spread(partial(shard_writer, dataset, committer), todo), 1):
        written, moved, size_bytes = written + (rows > 0), moved + rows, size_bytes + size
        on_shard(done, len(todo))
        generation.check()
    ranges = ranges_to_tell(dataset.state)
    reach = _reach(dataset.state)
    for span in ranges:
        generation.check()
        _tell_range(dataset, committer, span, np.flatnonzero((reach[0] < span[1]) & (reach[1] > span[0])))
    return CompactReport(written, shards - len(todo), moved, size_bytes, len(ranges))


def shards_to_write(dataset: Dataset, shard_bytes: int, seed: int | None = None) -> tuple[int, list[RowSet]]:
    """How many shards a compact dataset has, and the rows of those that are not yet there."""
    if not dataset.num_rows:
        return 0, []
    if seed is None:
        spans = np.array(list(shard_spans(dataset, shard_bytes)), np.int64)
        shards = _Shards(spans[:, 0], spans[:, 1], np.arange(len(spans)))
    else:
        shards = _shuffled(dataset, _rows_per_shard(dataset, shard_bytes), seed)
    return len(shards), [shards.rows(number) for number in shards.missing(dataset, arranged(seed)[ARRANGED])]


def ranges_to_tell(state: State) -> list[Span]:
    """Ranges of whole units of whose outcomes and lengths more than a few records tell.

    Where they begin and end follows from the outcomes in plan order, so that what comes later moves none of them.
    """
    units, _ = state.plan.unit_lengths()
    if not len(units):
        return []
    outcomes = RowSet.union_all([*state.rejects.values(), *state.filtered.values()])
    weight = np.maximum(outcomes.count_by_unit(len(units)), _ROWS_A_RANGE // _UNITS_A_RANGE)
    range_of = (np.cumsum(weight) - weight) // _ROWS_A_RANGE
    records, (first, stop) = state.reject_files.records, _reach(state)
    owner = records.file_owner[state.reject_files.numbers]
    pairs, lengths = records.flat("unit_rows").reshape(-1, 2), Lengths(records)
    teller = np.repeat(np.arange(len(records)), np.diff(records.places("unit_rows")) // 2)
    newest = np.array([lengths.told_by(unit) for unit in pairs[:, 0].tolist()], np.int64)
    held = (records.generation[teller] == newest) & (pairs[:, 0] < len(units))
    near = np.concatenate([unit_of(first), unit_of(stop - 1), pairs[held, 0]]).clip(max=len(units) - 1)
    told = np.unique(np.stack([range_of[near], np.concatenate([owner, owner, teller[held]])]), axis=1)
    many = np.flatnonzero(np.bincount(told[0]) > _FEW_TELL)
    begins, ends = (np.searchsorted(range_of, many, side=side) for side in ("left", "right"))
    return [(address(begin), address(end)) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]


def _reach(state: State) -> tuple[Ints, Ints]:
    """Of the write of each reject file an address before which, and one from which on, it settles nothing."""
    owner = state.reject_files.records.file_owner[state.reject_files.numbers]
    _, first, stop = extents(state.reject_files.records)
    return first[owner], stop[owner]


def _tell_range(dataset: Dataset, committer: Committer, span: Span, near: Ints) -> None:
    """Commit what is known of a range of units but for its stored rows: outcomes with their reasons, and lengths.

    near: which reject files may hold some of them.
    """
    state, wanted = dataset.state, RowSet.from_keys(np.array([span[0]]), np.array([span[1]]))
    tables = [REJECTS.empty_table()]
    for index in near.tolist():
        file = state.reject_files[index]
        with reading_table(dataset.root.uri_of(file.info.path)), dataset.root.open(file.info.path) as source:
            table = pq.ParquetFile(source, page_checksum_verification=True).read().cast(REJECTS)
        keys = address(table["unit"].to_numpy()) + table["row"].to_numpy()
        tables.append(table.filter(pa.array(wanted.covers(keys) & ~file.dead.covers(keys))))
    units, planned = state.plan.unit_lengths()
    open_ended = units[(planned < 0) & (units >= unit_of(span[0])) & (units < unit_of(span[1]))].tolist()
    lengths = {unit: state.unit_rows[unit] for unit in open_ended if unit in state.unit_rows}
    committer.commit(LATENTS.empty_table(), pa.concat_tables(tables), lengths)


def shard_spans(dataset: Dataset, shard_bytes: int) -> Iterator[Span]:
    """Half-open ranges of row addresses that make up one shard each: a function of the plan and the mean row."""
    if not dataset.num_rows:
        return
    rows_per_shard = _rows_per_shard(dataset, shard_bytes)
    units, lengths = _unit_lengths(dataset.state)
    first, rows = 0, 0
    for unit, length in zip(units.tolist(), lengths.tolist(), strict=True):
        if rows and rows + length > rows_per_shard:
            yield first, address(unit)
            first, rows = address(unit), 0
        parts = -(-length // rows_per_shard)
        for part in range(1, parts):
            cut = address(unit) + part * length // parts
            yield first, cut
            first = cut
        rows += length if parts < 2 else length - (parts - 1) * length // parts
    yield first, address(len(units))


def _unit_lengths(state: State) -> tuple[Ints, Ints]:
    """(unit numbers, rows of each as far as they are known)."""
    units, planned = state.plan.unit_lengths()
    lengths = planned.copy()
    unknown = lengths < 0
    lengths[unknown] = [state.unit_rows.get(unit, 0) for unit in units[unknown].tolist()]
    return units, lengths


def _rows_per_shard(dataset: Dataset, shard_bytes: int) -> int:
    """Settled source rows of a shard: rejected and filtered ones take no space, variants take theirs.

    Dead rows do not count for the mean: how often a write was repeated, and what was already compacted away, must not
    move the ends of shards.
    """
    groups = dataset.row_groups
    blobs = int((groups.size_bytes * groups.rows // np.maximum(groups.stored("rows"), 1)).sum())
    mean = (blobs + ROW_BYTES * dataset.num_rows) / dataset.state.covered.count()
    most = max(1, min(int(shard_bytes / mean), _MAX_ROWS * dataset.state.covered.count() // dataset.num_rows))
    step = 1 << max(0, most.bit_length() - 3)
    return most // step * step


def _shuffled(dataset: Dataset, rows_per_shard: int, seed: int) -> _Shards:
    """The shards of all pools: see the module. The rows are one line, in plan order; cuts are places on it."""
    units, lengths = _unit_lengths(dataset.state)
    ends = np.cumsum(lengths)
    versions = dataset.state.plan.units["version"].to_numpy()
    cuts, numbers = [np.zeros(1, np.int64)], [np.zeros(0, np.int64)]
    first = shards = 0
    for stop in (*(np.flatnonzero(np.diff(versions)) + 1).tolist(), len(units)):
        rows = int(ends[stop - 1]) - first
        if not rows or (rows < rows_per_shard and stop < len(units)):
            continue
        count = -(-rows // rows_per_shard)
        cells = np.arange(_STRETCHES * count, dtype=np.uint64).reshape(_STRETCHES, count)
        numbers.append(shards + np.argsort(keyed_words(cells, seed, first), axis=1, kind="stable").ravel())
        cuts.append(first + np.arange(1, _STRETCHES * count + 1) * rows // (_STRETCHES * count))
        first, shards = first + rows, shards + count
    places = np.concatenate(cuts)
    unit = np.searchsorted(ends, places, side="right")
    within = unit < len(units)
    keys = address(unit)
    keys[within] += places[within] - (ends - lengths)[unit[within]]
    held = np.diff(keys) > 0  # a small pool has empty parts
    return _Shards(keys[:-1][held], keys[1:][held], np.concatenate(numbers)[held])


@dataclass(frozen=True)
class _Shards:
    """Which rows make which shard: the addresses [starts[i], stops[i]), ascending, are of shard number[i]."""

    starts: Ints
    stops: Ints
    number: Ints

    def __len__(self) -> int:
        return int(self.number.max(initial=-1)) + 1

    @cached_property
    def _by_number(self) -> tuple[Ints, Ints]:
        order = np.argsort(self.number, kind="stable")
        return order, np.searchsorted(self.number[order], np.arange(len(self) + 1))

    def rows(self, number: int) -> RowSet:
        """The addresses of one shard."""
        order, first = self._by_number
        mine = order[first[number] : first[number + 1]]
        return RowSet.from_keys(self.starts[mine], self.stops[mine])

    def missing(self, dataset: Dataset, wanted: str) -> list[int]:
        """Those whose rows lie in several files, or in one with dead rows, with others, or arranged otherwise."""
        files, whole = np.zeros(len(self), np.int64), np.zeros(len(self), np.bool_)
        of_generation: dict[int, str] = {}
        for file in dataset.state.files:
            # Dead rows do not put a file into a shard: what a killed compaction has written is not written again.
            rows = file.record.stored - file.dead if file.dead else file.record.stored
            starts, stops = (np.concatenate(side) for side in zip(*rows.spans(), strict=True))
            first = np.searchsorted(self.starts, starts, side="right") - 1
            count = np.searchsorted(self.starts, stops, side="left") - first
            within = np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())
            touched = np.unique(self.number[within])
            files[touched] += 1
            if len(touched) == 1 and not file.dead:
                number = file.record.generation
                if number not in of_generation:
                    of_generation[number] = arrangement(dataset.root, number)
                whole[touched] = of_generation[number] == wanted
        return np.flatnonzero((files > 1) | ((files == 1) & ~whole)).tolist()


class RowSource:
    """Reads any set of a dataset's visible rows, whatever files they lie in; from several threads.

    Every page that is used has had its checksum compared: where a part of a row group is wanted, the whole is read
    once before its first.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._latents = StoredParts(dataset, "latent") if dataset.identity.kind == "latents" else None
        self._checked: set[int] = set()

    def read(self, wanted: RowSet) -> pa.Table | None:
        """The rows of a set of addresses; None when none of them is visible."""
        groups = self._dataset.row_groups
        near = wanted.touches(address(groups.stored("first_unit")), address(groups.stored("last_unit") + 1))
        tables = [self._of_group(index, wanted) for index in np.flatnonzero(near).tolist()]
        found = [table for table in tables if table is not None]
        if not found:
            return None
        # Encode once wrote files that may hold nulls in every column, by their schema.
        rows = pa.concat_tables(found, promote_options="default")
        known = {field.name: field for field in LATENTS} if self._latents is not None else {}
        return rows.cast(pa.schema([known.get(field.name, field) for field in rows.schema]))

    def _of_group(self, index: int, wanted: RowSet) -> pa.Table | None:
        info = self._dataset.row_groups.info(index)
        if RowSet.from_keys(np.array([address(info.first_unit)]), np.array([address(info.last_unit + 1)])) - wanted:
            names, places = ["unit", "row"], None
            if self._latents is not None and (places := self._latents.places(index)) is not None:
                names = [name for name in self._latents.columns(index) if name != "latent"]
            table = self._dataset.read(index, names)
            inside = wanted.covers(address(table["unit"].to_numpy()) + table["row"].to_numpy())
            if not inside.any():
                return None
            if not inside.all():
                if places is None:
                    return self._dataset.read(index, None).filter(pa.array(inside))
                return self._with_latents(index, table.filter(pa.array(inside)), places, inside)
        self._checked.add(index)
        return self._dataset.read(index, None)

    def _with_latents(
        self, index: int, others: pa.Table, places: ValuePlaces, inside: npt.NDArray[np.bool_]
    ) -> pa.Table:
        """Those rows `inside` a row group of which all else is read."""
        assert self._latents is not None
        if index in self._checked:
            values = self._latents.copy(places[inside])
            offsets = np.arange(len(values) + 1, dtype=np.int64) * places.width
            buffers = [None, pa.py_buffer(offsets), pa.py_buffer(values)]
            latents = pa.Array.from_buffers(pa.large_binary(), len(values), buffers)
        else:
            latents = self._dataset.read(index, ["latent"])["latent"].filter(pa.array(inside))
            self._checked.add(index)
        return others.add_column(self._latents.columns(index).index("latent"), LATENTS.field("latent"), latents)


def rows_in_span(dataset: Dataset, span: Span) -> pa.Table | None:
    """The visible rows of a span, whatever files they lie in; None when there are none."""
    return RowSource(dataset).read(RowSet.from_keys(np.array([span[0]]), np.array([span[1]])))


def shard_writer(dataset: Dataset, committer: Committer) -> Callable[[RowSet], tuple[int, int]]:
    """What writes a shard, given its rows' addresses."""
    source = RowSource(dataset)
    return lambda wanted: _write_shard(source, committer, wanted)


def _write_shard(source: RowSource, committer: Committer, wanted: RowSet) -> tuple[int, int]:
    """(rows, bytes) of the shard written of some rows; nothing is written when none of them is visible."""
    rows = source.read(wanted)
    if rows is None:
        return 0, 0
    # Reading took a while: who was fenced off meanwhile leaves no shard behind.
    check_newest(committer.root, committer.generation)
    record = committer.commit(rows, None, {})
    return (0, 0) if record is None else (len(rows), sum(f.size_bytes for f in record.files))
