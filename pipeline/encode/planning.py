"""From a listing of the source to frozen plan versions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from pipeline.storage.root import Root
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.ledger.state import State
from pipeline.store.plan import (
    DiffReport,
    EntryLike,
    Plan,
    PlannedEntry,
    append_version,
    diff,
    group_units,
    live_entries,
    read_plan,
)


def known_entries(root: Root, kind: str) -> Iterable[PlannedEntry]:
    """The live entries of a root's plan in the order of a listing; none unless all come from sources of this kind.

    For another kind the same object may stand for other rows.
    """
    plan = read_plan(root)
    return live_entries(plan) if all(version.source.get("kind") == kind for version in plan.versions) else ()


def planned_rows(state: State) -> int | None:
    """Rows that a run leaves settled in the end; None while the length of some unit is unknown."""
    units, lengths = state.plan.unit_lengths()
    known, retired = lengths.copy(), state.plan.retired
    for i in np.flatnonzero(lengths < 0):
        unit = int(units[i])
        known[i] = state.unit_rows.get(unit, 0 if retired.of_unit(unit) else -1)
    if (known < 0).any():
        return None
    return (RowSet.from_arrays(units, np.zeros_like(units), known) - retired).count() or None


def update_plan(
    root: Root,
    listing: Iterable[EntryLike],
    *,
    source: dict[str, Any],
    generation: int,
    unit_rows: int,
    unit_bytes: int,
    drop_removed: bool,
    before_freezing: Callable[[], None] = lambda: None,
) -> tuple[Plan, DiffReport]:
    """Diff the source with the plan in one streaming pass and freeze what is new or changed.

    `before_freezing` is called when units are to be added, before anything is written.
    """
    plan = read_plan(root)
    report = DiffReport()
    units = group_units(diff(plan, listing, report, drop_removed=drop_removed), unit_rows, unit_bytes)
    first = next(units, None)
    if first is None and not report.anything:
        return plan, report
    if first is not None:
        before_freezing()

    def all_units() -> Iterator[list[EntryLike]]:
        if first is not None:
            yield first
            yield from units

    # `append_version` reads the report once the units, and with them the diff, are exhausted.
    return append_version(plan, all_units(), report=report, source=source, generation=generation), report
