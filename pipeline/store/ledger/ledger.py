"""The ledger: commit records of the newest generation, bundles of all older visible ones, and what of them counts.

A bundle is a Parquet file of records that a claim lists; it replaces thousands of small reads by one.
Bundles are immutable; a claim adds one for the records since the last claim and merges them when many. Until that
claim comes, the records of the newest generation are read from its seals (see `bundles`), and singly after those.

What counts: a row that the plan has retired (its source changed) is dead everywhere. A row that several records
cover belongs to the record of the newest generation (a retried reject, a compacted shard), and among those of one
generation (a write that Ray repeated) to one that stores it before one that rejects it, of several to the one whose
name sorts first; in all others it is dead. A record of which no row counts any more is left out when bundles merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from pipeline.errors import PipelineError
from pipeline.storage.root import Root
from pipeline.store.ledger import layout
from pipeline.store.ledger.bundles import Kept, generation_records, read_bundle, write_bundle
from pipeline.store.ledger.generation import (
    PATIENCE_S,
    UPKEEP,
    Generation,
    at_one_generation,
    check_newest,
    claim_next,
    read_claim,
    visible_headers,
)
from pipeline.store.ledger.record import COVERED, CommitRecord, Records
from pipeline.store.ledger.rowset import BLOCK_ROWS, Int64s, RowSet, distinct
from pipeline.store.plan import plan_of

_MERGE_BUNDLES = 8


def commit(root: Root, record: CommitRecord) -> bool:
    """Make a record visible: True when it landed now, False when the same record had landed before.

    ConflictError when a newer generation fences this one off, or is about to: the outcome is unknown then, too. Any
    other exception leaves it unknown; committing the same record again is always right, for its name is its content.
    """
    created = root.put_if_absent(record.name, record.to_bytes())
    check_newest(root, record.generation)
    return created


def visible_records(root: Root, number: int | None = None, kept: Kept | None = None) -> Records:
    """Every commit record visible in generation `number`, by default the newest.

    kept: the bundles that an earlier call has read, which this one does not read again, and adds to.
    """
    if number is None:
        return at_one_generation(root, lambda newest: visible_records(root, newest, kept))
    if not number:
        return Records.of(())
    bundles = [read_bundle(root, bundle, kept) for bundle in read_claim(root, number)["bundles"]]
    return Records.union([*bundles, generation_records(root, number, kept)])


def collect(root: Root, number: int) -> list[str]:
    """Bundle everything visible in generation `number`; returns the names for the next claim."""
    if not number:
        return []
    claim = read_claim(root, number)
    bundles: list[str] = list(claim["bundles"])
    fresh = generation_records(root, number)
    # A run that moves rows leaves little to count of what was there before.
    if len(bundles) >= _MERGE_BUNDLES or claim["job"] in UPKEEP:
        fresh = Records.union([*(read_bundle(root, bundle) for bundle in bundles), fresh])
        # Of the plan, too, what this generation sees: what is retired stays so.
        fresh = counting_records(fresh, plan_of(root, visible_headers(root, number)).retired)
        bundles = []
    if len(fresh):
        bundles.append(write_bundle(root, layout.SNAPSHOTS, fresh, number + 1))
    return bundles


# -- Which rows of which records count --------------------------------------------------------------------------


def counting_records(records: Records, retired: RowSet) -> Records:
    """Without those of which no row counts, and none will: what is visible is the same without them.

    One that tells the length of a unit, or has rejected rows of a unit whose length is told, stays until a newer one
    tells it: see `Lengths`.
    """
    counts, _, _ = extents(records)
    dead = dead_rows(retired, records)
    gone = np.array([at for at, rows in dead.items() if rows.count() == counts[at]], np.int64)
    lengths = Lengths(records)
    if lengths:
        for at in gone.tolist():
            record = records[at][1]
            units = {*record.unit_rows, *(u for rows in record.rejects.values() for u in rows.units().tolist())}
            if any(lengths.told_by(unit) <= record.generation for unit in units if unit in lengths):
                gone[gone == at] = -1
    kept = np.ones(len(records), np.bool_)
    kept[gone[gone >= 0]] = False
    return records.take(kept)


class Lengths:
    """Which of the lengths that records tell of their units hold.

    The newest generation's, and of several of one generation the largest: a reading that failed told a smaller one. A
    length whose last row was rejected and has been settled anew since does not hold: the row may have stood for a
    rest that could not be read, and reading it again may have ended before it came to the end.
    """

    def __init__(self, records: Records) -> None:
        self._stated: dict[int, tuple[int, int]] = {}  # unit -> (generation, rows)
        self._superseded: list[tuple[int, RowSet]] = []
        pairs = records.flat("unit_rows").reshape(-1, 2)
        generations = np.repeat(records.generation, np.diff(records.places("unit_rows")) // 2)
        for (unit, rows), generation in zip(pairs.tolist(), generations.tolist(), strict=True):
            self._stated[unit] = max(self._stated.get(unit, (0, 0)), (generation, rows))

    def __bool__(self) -> bool:
        return bool(self._stated)

    def __contains__(self, unit: int) -> bool:
        return unit in self._stated

    def told_by(self, unit: int) -> int:
        """The newest generation that tells the length of a unit."""
        return self._stated[unit][0]

    def supersede(self, generation: int, rejects: RowSet) -> None:
        """Rows that a record of this generation has rejected, and that have been settled anew or retired since."""
        if rejects:
            self._superseded.append((generation, rejects))

    def known(self) -> dict[int, int]:
        """Unit -> rows of the lengths that hold."""
        for generation, rejects in self._superseded:
            for unit in rejects.units().tolist():
                stated, rows = self._stated.get(unit, (generation + 1, 0))
                if stated <= generation and any(start < rows <= stop for start, stop in rejects.of_unit(unit)):
                    del self._stated[unit]
        return {unit: rows for unit, (_, rows) in self._stated.items()}


def dead_rows(retired: RowSet, records: Records) -> dict[int, RowSet]:
    """Of each record that has rows which do not count, these rows."""
    counts, first, stop = extents(records)
    everything = records.rows_of(records.flat("set_kind") == COVERED)
    if counts.sum() == everything.count() and not everything & retired:
        return {}
    dead: dict[int, RowSet] = {}
    # What is retired is dead in all, what a newer generation covers in all older ones.
    newer = retired
    for generation in distinct(records.generation)[::-1].tolist():
        mine = records.generation == generation
        for at in np.flatnonzero(mine)[newer.touches(first[mine], stop[mine])].tolist():
            gone = records.covered(at) & newer.within(int(first[at]), int(stop[at]))
            if gone:
                dead[at] = gone
        settled = records.settled(generation)
        if counts[mine].sum() != settled.count():
            for at, lost in _repeated_rows(records, np.flatnonzero(mine), first, stop):
                dead[at] = dead.get(at, RowSet.empty()) | lost
        newer = newer | settled
    return dead


def extents(records: Records) -> tuple[Int64s, Int64s, Int64s]:
    """How many rows each record settles, and addresses before which and from which on it has none: int64 [n] each."""
    counts, first, stop = (np.zeros(len(records), np.int64) for _ in range(3))
    first[:] = np.iinfo(np.int64).max
    owner, covering = records.set_owner, records.flat("set_kind") == COVERED
    spans, blocks = (np.repeat(covering, records.flat(name)) for name in ("set_spans", "set_blocks"))
    keys = records.flat("span_keys").reshape(-1, 2)[spans]
    begin = records.flat("block_numbers")[blocks] * BLOCK_ROWS
    bits = records.flat("block_bits").reshape(-1, 8)[blocks]
    for lines, sizes, starts, stops in (
        (np.repeat(owner, records.flat("set_spans"))[spans], keys[:, 1] - keys[:, 0], keys[:, 0], keys[:, 1]),
        (
            np.repeat(owner, records.flat("set_blocks"))[blocks],
            np.bitwise_count(bits).sum(axis=1, dtype=np.int64),
            begin,
            begin + BLOCK_ROWS,
        ),
    ):
        np.add.at(counts, lines, sizes)
        np.minimum.at(first, lines, starts)
        np.maximum.at(stop, lines, stops)
    return counts, np.minimum(first, stop), stop


def _repeated_rows(records: Records, mine: Int64s, first: Int64s, stop: Int64s) -> Iterator[tuple[int, RowSet]]:
    """(record, its rows that another one of the same generation holds) where several hold them.

    One that stores a row comes before one that leaves it out, of several the first name.
    """
    # Only records that reach into each other's extents can: few of all there are, in chains that do not meet.
    order = mine[np.argsort(first[mine], kind="stable")]
    reach = np.maximum.accumulate(stop[order])
    meets = np.zeros(len(order), np.bool_)
    meets[1:] = first[order][1:] < reach[:-1]
    chains = np.cumsum(~meets)
    near = np.flatnonzero(np.bincount(chains)[chains] > 1)
    # What a record stores and what it leaves out take part each by itself.
    parts: list[tuple[int, int, int, RowSet]] = []
    for at, chain in zip(order[near].tolist(), chains[near].tolist(), strict=True):
        record = records[at][1]
        parts.append((chain, 0, at, record.stored if record.reject_file else record.covered))
        if record.reject_file:
            parts.append((chain, 1, at, record.settled))
    parts.sort(key=lambda part: part[:3])
    lost: dict[int, RowSet] = {}
    taken, taken_in = RowSet.empty(), 0
    for chain, _, at, rows in parts:
        taken, taken_in = (taken if chain == taken_in else RowSet.empty()), chain
        again = rows & taken
        if again:
            lost[at] = lost.get(at, RowSet.empty()) | again
        taken = taken | rows
    yield from lost.items()


@contextmanager
def claimed(
    root: Root,
    job: str,
    *,
    note: Callable[[], Mapping[str, Any]] = dict,
    after: int = 0,
    patience_s: float = PATIENCE_S,
) -> Iterator[Generation]:
    """The next generation of a root, which the block holds; raises what `claim_next` raises.

    Closed with its `summary` when the block ends, with the kind of a PipelineError that ends it. Anything else leaves
    it open, as a crash does, for the next run to find.
    """
    generation = claim_next(
        root,
        lambda previous: collect(root, previous),
        job=job,
        note=note,
        after=after,
        patience_s=patience_s,
    )
    try:
        yield generation
        generation.close()
    except PipelineError as error:
        generation.close({"status": type(error).__name__}, sealed=False)
        raise
    finally:
        generation.abandon()
