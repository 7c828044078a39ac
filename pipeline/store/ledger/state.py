"""The visible state of a dataset, folded from its plan and its commit records.

Rules of the fold. A row that the plan has retired (its source changed) is dead everywhere. A row that several
records cover belongs to the record of the newest generation (a retried reject, a compacted shard), and among
those of one generation (a write that Ray repeated) to one that stores it before one that rejects it, of several to
the one whose name sorts first; in all others it is dead.
A file whose rows are all dead is no longer visible. What no live record covers is a gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.storage.root import Root
from pipeline.store.ledger.generation import at_one_generation
from pipeline.store.ledger.ledger import visible_records
from pipeline.store.ledger.record import CommitRecord, FileInfo
from pipeline.store.ledger.rowset import MAX_ROWS, RowSet
from pipeline.store.plan import Plan, read_plan


@dataclass(frozen=True)
class DataFile:
    """A file with visible rows for other readers: where it lies, how many they are, and which.

    row_filter: SQL over the columns unit and row that is true for the visible rows; None where all are.
    """

    uri: str
    num_rows: int
    size_bytes: int
    row_filter: str | None


@dataclass(frozen=True)
class VisibleFile:
    """A visible file, the rows inside it that are dead, and the commit record that names it."""

    info: FileInfo
    dead: RowSet
    record: CommitRecord

    def for_others(self, uri: str, num_rows: int) -> DataFile:
        """What another reader of Parquet must know of it."""
        return DataFile(uri, num_rows, self.info.size_bytes, f"NOT ({self.dead.sql()})" if self.dead else None)


@dataclass(frozen=True)
class State:
    """Everything about a dataset that does not need its data files: rows are source rows, not variants."""

    plan: Plan
    files: tuple[VisibleFile, ...]
    reject_files: tuple[VisibleFile, ...]
    covered: RowSet
    rejects: dict[str, RowSet]
    filtered: dict[str, RowSet]
    unit_rows: dict[int, int]

    @property
    def stored(self) -> RowSet:
        """Source rows that are visible as data."""
        return self.covered - RowSet.union_all([*self.rejects.values(), *self.filtered.values()])

    @property
    def num_stored(self) -> int:
        """How many rows `stored` has."""
        return self.covered.count() - self.num_rejected - self.num_filtered

    @property
    def num_rejected(self) -> int:
        """Source rows that were rejected."""
        return sum(rows.count() for rows in self.rejects.values())

    @property
    def num_filtered(self) -> int:
        """Source rows that a filter of the configuration left out."""
        return sum(rows.count() for rows in self.filtered.values())

    def length_of(self, unit: int, planned: int | None) -> int | None:
        """Rows of a unit: as planned, or as reading found; None while unknown."""
        return planned if planned is not None else self.unit_rows.get(unit)

    def gaps(self, retry: RowSet | None = None) -> RowSet:
        """Planned rows that no live record settles, `retry` rows included; a stop of MAX_ROWS is "to the end"."""
        units, lengths = self.plan.unit_lengths()
        known = lengths.copy()
        unknown = lengths < 0
        known[unknown] = [self.unit_rows.get(unit, MAX_ROWS) for unit in units[unknown].tolist()]
        if retry is not None:
            # The last row may stand for a rest that could not be read.
            last = retry.contains(units, np.maximum(known - 1, 0))
            known[unknown & last] = MAX_ROWS
        planned = RowSet.from_arrays(units, np.zeros_like(units), known) - self.plan.retired
        return planned - (self.covered - retry if retry is not None else self.covered)

    def retryable(self, reasons: Sequence[str]) -> RowSet:
        """Rows rejected or filtered for one of some reasons."""
        outcomes = [*self.rejects.items(), *self.filtered.items()]
        return RowSet.union_all([rows for reason, rows in outcomes if reason in reasons])


def read_state(root: Root) -> State:
    """Open a dataset's ledger and plan, as they were at one moment of one generation."""
    return at_one_generation(root, lambda number: state_at(root, number))


def state_at(root: Root, number: int) -> State:
    """The state that generation `number` sees now."""
    # The records first: a row is planned before it is settled, so the plan read after them knows all of theirs.
    records = visible_records(root, number)
    return fold(read_plan(root, number), records)


def fold(plan: Plan, records: Sequence[tuple[str, CommitRecord]]) -> State:
    """The state that some records, ordered by name, make of a plan."""
    dead = _dead_rows(plan.retired, [record for _, record in records])
    files: list[VisibleFile] = []
    reject_files: list[VisibleFile] = []
    rejects: dict[str, list[RowSet]] = {}
    filtered: dict[str, list[RowSet]] = {}
    lengths = _Lengths()
    for (_, record), gone in zip(records, dead, strict=True):
        if record.files and (not gone or record.stored - gone):
            dead_rows = gone & record.stored if gone else gone
            files += [VisibleFile(f, dead_rows, record) for f in record.files]
        if record.reject_file and (not gone or record.settled - gone):
            dead_rows = gone & record.settled if gone else gone
            reject_files.append(VisibleFile(record.reject_file, dead_rows, record))
        for reason, rows in record.rejects.items():
            rejects.setdefault(reason, []).append(rows - gone)
            lengths.supersede(record.generation, rows & gone)
        for reason, rows in record.filtered.items():
            filtered.setdefault(reason, []).append(rows - gone)
        lengths.state(record.generation, record.unit_rows)

    def by_unit(file: VisibleFile) -> tuple[int, int, str]:
        groups = file.info.row_groups
        first = int(groups.first_unit.min()) if len(groups) else 0
        return first, int(groups.last_unit.max()) if len(groups) else 0, file.info.path

    return State(
        plan=plan,
        files=tuple(sorted({file.info.path: file for file in files}.values(), key=by_unit)),
        reject_files=tuple(reject_files),
        covered=RowSet.union_all([r.covered for _, r in records]) - plan.retired,
        rejects=_merged(rejects),
        filtered=_merged(filtered),
        unit_rows=lengths.known(),
    )


class _Lengths:
    """Which of the lengths that records tell of their units hold.

    The newest generation's, and of several of one generation the largest: a reading that failed told a smaller one. A
    length whose last row was rejected and has been settled anew since does not hold: the row may have stood for a
    rest that could not be read, and reading it again may have ended before it came to the end.
    """

    def __init__(self) -> None:
        self._stated: dict[int, tuple[int, int]] = {}  # unit -> (generation, rows)
        self._superseded: list[tuple[int, RowSet]] = []

    def state(self, generation: int, unit_rows: Mapping[int, int]) -> None:
        for unit, rows in unit_rows.items():
            self._stated[unit] = max(self._stated.get(unit, (0, 0)), (generation, rows))

    def supersede(self, generation: int, rejects: RowSet) -> None:
        if rejects:
            self._superseded.append((generation, rejects))

    def known(self) -> dict[int, int]:
        for generation, rejects in self._superseded:
            for unit in rejects.units().tolist():
                stated, rows = self._stated.get(unit, (generation + 1, 0))
                if stated <= generation and any(start < rows <= stop for start, stop in rejects.of_unit(unit)):
                    del self._stated[unit]
        return {unit: rows for unit, (_, rows) in self._stated.items()}


def _merged(sets: dict[str, list[RowSet]]) -> dict[str, RowSet]:
    unions = {reason: RowSet.union_all(parts) for reason, parts in sorted(sets.items())}
    return {reason: rows for reason, rows in unions.items() if rows}


def _dead_rows(retired: RowSet, records: Sequence[CommitRecord]) -> list[RowSet]:
    """For each record those of its rows that do not count; linear in the number of intervals."""
    dead = [RowSet.empty()] * len(records)
    # What a record stores and what it leaves out take part each by itself.
    parts = [(i, 0, r.stored if r.reject_file else r.covered) for i, r in enumerate(records)]
    parts += [(i, 1, r.settled) for i, r in enumerate(records) if r.reject_file]
    # What is retired takes part as one that wins everywhere: its rows are dead in all others.
    sets = [*(rows for _, _, rows in parts), retired]
    if not any(sets):
        return dead
    starts, stops = (np.concatenate([getattr(s, side) for s in sets]) for side in ("starts", "stops"))
    owner = np.repeat(np.arange(len(sets)), [len(s.starts) for s in sets])
    # Cut the line at every boundary: each interval is a run of segments that lie in it as a whole.
    cuts = np.unique(np.concatenate([starts, stops]))
    low, high = np.searchsorted(cuts, starts), np.searchsorted(cuts, stops)
    length = high - low
    segment = np.repeat(low - np.concatenate([[0], np.cumsum(length)[:-1]]), length) + np.arange(length.sum())
    owner = np.repeat(owner, length)
    contested = np.bincount(segment, minlength=len(cuts))[segment] > 1
    segment, owner = segment[contested], owner[contested]
    # Among those that hold a segment the newest generation wins, then one that stores it, then the first name.
    rank = np.full(len(sets), -1, np.int64)
    order = sorted(range(len(parts)), key=lambda p: (-records[parts[p][0]].generation, parts[p][1], parts[p][0]))
    rank[order] = np.arange(len(parts))
    winner = np.full(len(cuts), len(parts), np.int64)
    np.minimum.at(winner, segment, rank[owner])
    lost = winner[segment] != rank[owner]
    segment, owner = segment[lost], owner[lost]
    by_owner = np.argsort(owner, kind="stable")
    segment, owner = segment[by_owner], owner[by_owner]
    losers, first, count = np.unique(owner, return_index=True, return_counts=True)
    for loser, begin, size in zip(losers, first, count, strict=True):
        mine = segment[begin : begin + size]
        record = parts[loser][0]
        dead[record] = dead[record] | RowSet.from_keys(cuts[mine], cuts[mine + 1])
    return dead
