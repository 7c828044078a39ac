"""Comparing a fresh listing of the source with the plan: one streaming merge, both sides ordered by key."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pipeline.store.ledger.rowset import MAX_ROWS
from pipeline.store.plan.plan import EntryLike, Plan, PlannedEntry


@dataclass
class DiffReport:
    """What a diff found; complete once the entries it yields are exhausted."""

    new: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    removed_examples: list[str] = field(default_factory=list)
    retired: list[tuple[int, int, int]] = field(default_factory=list)

    def retire(self, unit: int, start: int, stop: int) -> None:
        """Rows that no longer count; neighbours become one interval, as changed objects often are."""
        if self.retired and self.retired[-1][0] == unit and self.retired[-1][2] == start:
            start = self.retired.pop()[1]
        self.retired.append((unit, start, stop))

    @property
    def anything(self) -> bool:
        """Whether the plan needs another version."""
        return bool(self.new or self.changed or self.retired)


def diff(
    plan: Plan, listing: Iterable[EntryLike], report: DiffReport, *, drop_removed: bool = False
) -> Iterator[EntryLike]:
    """Yield the entries to plan anew (new or changed), filling `report` on the way.

    `listing` must be strictly ordered by (key, row_start). A changed entry's old rows are retired, and so are those
    of a span that its object, still listed, no longer has: it was rewritten in other spans. An object that is gone
    is counted, and retired only with `drop_removed`. Memory does not grow with either side.
    """
    old = live_entries(plan)
    before = next(old, None)
    last_key: str | None = None  # of the listing: the key of an unlisted span is listed if it is this or the next
    for entry in listing:
        place = (entry.key, entry.row_start)
        while before is not None and (before.key, before.row_start) < place:
            _unlisted(report, before, before.key in (last_key, entry.key), drop_removed)
            before = next(old, None)
        last_key = entry.key
        if before is None or (before.key, before.row_start) != place:
            report.new += 1
            yield entry
            continue
        if same_version(before, entry):
            report.unchanged += 1
        else:
            report.changed += 1
            report.retire(*_rows_of(before))
            yield entry
        before = next(old, None)
    while before is not None:
        _unlisted(report, before, before.key == last_key, drop_removed)
        before = next(old, None)


def same_version(old: PlannedEntry, new: EntryLike) -> bool:
    """Whether two listings of one place show the same content: size, rows and metadata, then etag, else mtime."""
    if (old.size_bytes, old.row_stop, old.meta) != (new.size_bytes, new.row_stop, new.meta):
        return False
    if old.etag is not None or new.etag is not None:
        return old.etag == new.etag
    return old.mtime_ns == new.mtime_ns


def group_units(entries: Iterable[EntryLike], max_rows: int, max_bytes: int) -> Iterator[list[EntryLike]]:
    """Units of consecutive single-row entries up to some rows and bytes; an entry of several rows is its own unit."""
    unit: list[EntryLike] = []
    size = 0
    for entry in entries:
        single = entry.row_stop is not None and entry.row_stop - entry.row_start == 1
        if unit and (not single or len(unit) >= max_rows or size + entry.size_bytes > max_bytes):
            yield unit
            unit, size = [], 0
        if single:
            unit.append(entry)
            size += entry.size_bytes
        else:
            yield [entry]
    if unit:
        yield unit


def live_entries(plan: Plan) -> Iterator[PlannedEntry]:
    """The live entries of all versions in key order: each version was planned in key order."""
    runs = [plan.iter_entries(version) for version in plan.versions]
    for entry in heapq.merge(*runs, key=lambda e: (e.key, e.row_start)):
        if not plan.retired or not _is_retired(plan, entry):
            yield entry


def _is_retired(plan: Plan, entry: PlannedEntry) -> bool:
    return any(start <= entry.first_row < stop for start, stop in plan.retired.of_unit(entry.unit))


def _rows_of(entry: PlannedEntry) -> tuple[int, int, int]:
    stop = MAX_ROWS if entry.rows is None else entry.first_row + entry.rows
    return entry.unit, entry.first_row, stop


def _unlisted(report: DiffReport, entry: PlannedEntry, rewritten: bool, drop: bool) -> None:
    """A planned span that the listing lacks: its object was `rewritten` in other spans, or is gone."""
    if rewritten:
        report.changed += 1
    else:
        report.removed += 1
        if len(report.removed_examples) < 10:
            report.removed_examples.append(entry.key)
    if rewritten or drop:
        report.retire(*_rows_of(entry))
