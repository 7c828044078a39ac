"""The visible state of a dataset, folded from its plan and its commit records: see `ledger` for which rows count.

A file whose rows are all dead is no longer visible. What no live record covers is a gap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.storage.root import Root
from pipeline.store.ledger.generation import at_one_generation
from pipeline.store.ledger.ledger import Lengths, dead_rows, extents, visible_records
from pipeline.store.ledger.record import COVERED, FILTERED, REJECTED, CommitRecord, FileInfo, Records
from pipeline.store.ledger.rowset import MAX_ROWS, Int64s, RowSet
from pipeline.store.plan import Plan, read_plan
from pipeline.store.read.row_groups import ReadableGroups


@dataclass(frozen=True)
class VisibleFile:
    """A visible file, the rows inside it that are dead, and the commit record that names it."""

    info: FileInfo
    dead: RowSet
    record: CommitRecord


class VisibleFiles(Sequence[VisibleFile]):
    """Visible files in order, as columns; an item is made when it is asked for.

    numbers: which of all files of the `records`, int64 [n]; dead: for those of them that have dead rows, these rows.
    """

    def __init__(self, records: Records, numbers: Int64s, dead: Mapping[int, RowSet]) -> None:
        self.records, self.numbers, self.dead = records, numbers, dead

    @cached_property
    def num_groups(self) -> Int64s:
        """Row groups of each: int64 [n]."""
        return np.asarray(self.records.flat("file_groups")[self.numbers])

    @cached_property
    def groups(self) -> Int64s:
        """Which of all row groups of the records theirs are, file after file: int64 [row groups]."""
        return _ranges(self.records.group_places[:-1][self.numbers], self.num_groups)

    @cached_property
    def size_bytes(self) -> Int64s:
        """Of each: int64 [n]."""
        return np.asarray(self.records.flat("file_numbers")[2 * self.numbers])

    @cached_property
    def paths(self) -> pa.StringArray:
        """Of each its key."""
        return self.records.texts("file_path").take(pa.array(self.numbers))

    @cached_property
    def generations(self) -> Int64s:
        """Of each the generation that wrote it: int64 [n]."""
        return np.asarray(self.records.generation[self.records.file_owner[self.numbers]])

    def dead_in(self, index: int) -> RowSet:
        """The dead rows of one."""
        return self.dead.get(int(self.numbers[index]), RowSet.empty())

    @cached_property
    def with_dead(self) -> npt.NDArray[np.bool_]:
        """Which of them have dead rows: bool [n]."""
        return np.isin(self.numbers, np.fromiter(self.dead, np.int64, len(self.dead)))

    def readable(self) -> ReadableGroups:
        """The row groups of all of them."""
        records, channels = self.records, self.records.flat("file_channels")[self.numbers]
        several = np.unique(channels[self.num_groups > 0])
        sums = records.sums_of(self.groups, int(several[0])) if len(several) == 1 and several[0] else None
        dead = {at: self.dead_in(at) for at in np.flatnonzero(self.with_dead).tolist()}
        numbers = records.flat("group_numbers").reshape(-1, 7)[self.groups]
        buckets = records.texts("group_bucket").take(pa.array(self.groups))
        held = records.held[self.groups]
        return ReadableGroups.of(self.paths, self.size_bytes, self.num_groups, dead, numbers, sums, buckets, held)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> VisibleFile: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[VisibleFile, ...]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        number = int(self.numbers[index])
        record = self.records[int(self.records.file_owner[number])][1]
        return VisibleFile(self.records.file(number), self.dead_in(index), record)

    def __iter__(self) -> Iterator[VisibleFile]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class State:
    """Everything about a dataset that does not need its data files: rows are source rows, not variants."""

    plan: Plan
    files: VisibleFiles
    reject_files: VisibleFiles
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
    """The state that some records make of a plan."""
    records = records if isinstance(records, Records) else Records.of(records)
    kind, owner = records.flat("set_kind"), records.set_owner
    dead = dead_rows(plan.retired, records)
    clean = np.ones(len(records), np.bool_)
    clean[list(dead)] = False
    lengths, (counts, firsts, _) = Lengths(records), extents(records)
    # Of a record that has no live row nothing counts but, for the lengths of units, what it has rejected.
    partly = {at: gone for at, gone in dead.items() if gone.count() < counts[at]}
    alive, dead_in = _alive_files(records, clean, partly)
    outcomes: dict[int, dict[str, RowSet]] = {}
    reasons = records.texts("set_reason").dictionary_encode()
    codes = reasons.indices.to_numpy()
    for outcome in (REJECTED, FILTERED):
        mine = kind == outcome
        parts = {
            reason: [records.rows_of(mine & (codes == code) & clean[owner])]
            for code, reason in enumerate(reasons.dictionary.to_pylist())
            if (mine & (codes == code)).any()
        }
        for at, gone in (dead if lengths and outcome == REJECTED else partly).items():
            record = records[at][1]
            for reason, rows in (record.rejects if outcome == REJECTED else record.filtered).items():
                parts[reason].append(rows - gone)
                if outcome == REJECTED:
                    lengths.supersede(record.generation, rows & gone)
        unions = {reason: RowSet.union_all(rows) for reason, rows in sorted(parts.items())}
        outcomes[outcome] = {reason: rows for reason, rows in unions.items() if rows}
    rejects = alive[records.is_reject_file[alive]]
    rejects = rejects[np.argsort(firsts[records.file_owner[rejects]], kind="stable")]
    return State(
        plan=plan,
        files=VisibleFiles(records, _in_order(records, alive[~records.is_reject_file[alive]]), dead_in),
        reject_files=VisibleFiles(records, rejects, dead_in),
        covered=records.rows_of(kind == COVERED) - plan.retired,
        rejects=outcomes[REJECTED],
        filtered=outcomes[FILTERED],
        unit_rows=lengths.known(),
    )


def _alive_files(
    records: Records, clean: npt.NDArray[np.bool_], partly: Mapping[int, RowSet]
) -> tuple[Int64s, dict[int, RowSet]]:
    """Which of the records' files have a visible row, int64 [m], and of those the rows that are dead."""
    alive = clean[records.file_owner]
    first, dead_in = records.places("file_path"), {}
    for at, gone in partly.items():
        record = records[at][1]
        for number in range(int(first[at]), int(first[at + 1])):
            rows = record.settled if records.is_reject_file[number] else record.stored
            alive[number] = bool(rows - gone)
            if alive[number] and rows & gone:
                dead_in[number] = rows & gone
    return np.flatnonzero(alive), dead_in


def _in_order(records: Records, files: Int64s) -> Int64s:
    """Files by their first unit, their last and their path, each path once."""
    sizes = records.flat("file_groups")[files]
    units = records.flat("group_numbers").reshape(-1, 7)[_ranges(records.group_places[:-1][files], sizes), 2:4]
    ends = np.zeros((len(files), 2), np.int64)
    begins = (np.cumsum(sizes) - sizes)[sizes > 0]
    if len(begins):
        ends[sizes > 0, 0] = np.minimum.reduceat(units[:, 0], begins)
        ends[sizes > 0, 1] = np.maximum.reduceat(units[:, 1], begins)
    paths = records.texts("file_path").take(pa.array(files))
    # The last of one path stands for all.
    table = pa.table([ends[:, 0], ends[:, 1], paths, -np.arange(len(files))], ["first", "last", "path", "late"])
    order = pc.sort_indices(table, [(name, "ascending") for name in table.column_names])
    repeated = np.zeros(len(files), np.bool_)
    if len(files):
        sorted_paths = paths.take(order)
        repeated[1:] = pc.equal(sorted_paths[1:], sorted_paths[:-1]).to_numpy(zero_copy_only=False)
    return np.asarray(files[order.to_numpy()[~repeated]])


def _ranges(begins: Int64s, sizes: Int64s) -> Int64s:
    """The numbers begin, begin + 1, ... of each range, one range after the other."""
    ends = np.cumsum(sizes)
    return np.asarray(np.arange(ends[-1] if len(ends) else 0) + np.repeat(begins - (ends - sizes), sizes))
