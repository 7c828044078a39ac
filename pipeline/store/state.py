"""The visible state of a dataset, folded from its plan and its commit records.

Rules of the fold. A row that the plan has retired (its source changed) is dead everywhere. A row that several
records cover belongs to the record of the newest generation (a retried reject, a compacted shard), and among
those of one generation to the one whose name sorts first (a write that Ray repeated); in all others it is dead.
A file whose rows are all dead is no longer visible. What no live record covers is a gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.storage import Root
from pipeline.store.ledger import visible_records
from pipeline.store.plan import Plan, read_plan
from pipeline.store.record import CommitRecord, FileInfo
from pipeline.store.rowset import MAX_ROWS, RowSet


@dataclass(frozen=True)
class VisibleFile:
    """A visible data file and the rows inside it that are dead."""

    info: FileInfo
    dead: RowSet


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
    def num_stored(self) -> int:
        """Source rows that are visible as data."""
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
        for i in np.flatnonzero(lengths < 0):
            known[i] = self.unit_rows.get(int(units[i]), MAX_ROWS)
        planned = RowSet.from_arrays(units, np.zeros_like(units), known) - self.plan.retired
        return planned - (self.covered - retry if retry is not None else self.covered)

    def retryable(self, reasons: Sequence[str]) -> RowSet:
        """Rows rejected or filtered for one of some reasons."""
        found = [*self.rejects.items(), *self.filtered.items()]
        return RowSet.union_all([rows for reason, rows in found if reason in reasons])


def read_state(root: Root) -> State:
    """Open a dataset's ledger and plan."""
    return fold(read_plan(root), visible_records(root))


def fold(plan: Plan, records: Sequence[tuple[str, CommitRecord]]) -> State:
    """The state that some records, ordered by name, make of a plan."""
    dead = _dead_rows(plan.retired, [record for _, record in records])
    files: list[VisibleFile] = []
    reject_files: list[VisibleFile] = []
    rejects: dict[str, list[RowSet]] = {}
    filtered: dict[str, list[RowSet]] = {}
    unit_rows: dict[int, int] = {}
    for (_, record), gone in zip(records, dead, strict=True):
        if record.files and (gone is plan.retired or record.stored - gone):
            files += [VisibleFile(f, gone) for f in record.files]
        if record.reject_file:
            reject_files.append(VisibleFile(record.reject_file, gone))
        for reason, rows in record.rejects.items():
            rejects.setdefault(reason, []).append(rows - gone)
        for reason, rows in record.filtered.items():
            filtered.setdefault(reason, []).append(rows - gone)
        unit_rows.update(record.unit_rows)
    return State(
        plan=plan,
        files=_in_unit_order(files),
        reject_files=tuple(reject_files),
        covered=RowSet.union_all([r.covered for _, r in records]) - plan.retired,
        rejects=_merged(rejects),
        filtered=_merged(filtered),
        unit_rows=unit_rows,
    )


def _in_unit_order(files: Sequence[VisibleFile]) -> tuple[VisibleFile, ...]:
    def first_unit(file: VisibleFile) -> tuple[int, int, str]:
        units = [g.first_unit for g in file.info.row_groups]
        last = [g.last_unit for g in file.info.row_groups]
        return min(units, default=0), max(last, default=0), file.info.path

    unique = {file.info.path: file for file in files}
    return tuple(sorted(unique.values(), key=first_unit))


def _merged(sets: dict[str, list[RowSet]]) -> dict[str, RowSet]:
    unions = {reason: RowSet.union_all(parts) for reason, parts in sorted(sets.items())}
    return {reason: rows for reason, rows in unions.items() if rows}


def _dead_rows(retired: RowSet, records: Sequence[CommitRecord]) -> list[RowSet]:
    """For each record the rows of its files that do not count."""
    sets = [r.covered for r in records]
    contested = _contested(sets)
    if not contested:
        return [retired] * len(records)
    # Every elementary segment of the contested rows goes to the record that ranks first; all others lose it.
    order = sorted(range(len(records)), key=lambda i: (-records[i].generation, i))
    shares = [(rank, i, sets[i] & contested) for rank, i in enumerate(order)]
    cuts = np.unique(np.concatenate([np.concatenate([s.starts, s.stops]) for _, _, s in shares]))
    segments = [np.flatnonzero(s.covers(cuts[:-1])) for _, _, s in shares]
    winner = np.full(len(cuts), len(records), np.int64)
    for (rank, _, _), mine in zip(shares, segments, strict=True):
        winner[mine] = np.minimum(winner[mine], rank)
    dead = [retired] * len(records)
    for (rank, i, _), mine in zip(shares, segments, strict=True):
        lost = mine[winner[mine] != rank]
        if len(lost):
            dead[i] = retired | RowSet.from_keys(cuts[lost], cuts[lost + 1])
    return dead


def _contested(sets: Sequence[RowSet]) -> RowSet:
    """Rows that are in at least two of some sets."""
    if not sets:
        return RowSet.empty()
    starts = np.sort(np.concatenate([s.starts for s in sets]))
    stops = np.sort(np.concatenate([s.stops for s in sets]))
    cuts = np.unique(np.concatenate([starts, stops]))
    depth = np.searchsorted(starts, cuts, side="right") - np.searchsorted(stops, cuts, side="right")
    many = np.flatnonzero(depth[:-1] > 1)
    return RowSet.from_keys(cuts[many], cuts[many + 1])
