"""From a listing of the source to frozen plan versions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.storage import Root
from pipeline.store.plan import EntryLike, Plan, append_version, read_plan
from pipeline.store.plan_diff import DiffReport, diff, group_units


def update_plan(
    root: Root,
    listing: Iterable[EntryLike],
    *,
    source: dict[str, Any],
    generation: int,
    unit_rows: int,
    unit_bytes: int,
    drop_removed: bool,
) -> tuple[Plan, DiffReport]:
    """Diff the source with the plan in one streaming pass and freeze what is new or changed."""
    plan = read_plan(root)
    report = DiffReport()
    units = group_units(diff(plan, listing, report, drop_removed=drop_removed), unit_rows, unit_bytes)
    first = next(units, None)
    if first is None and not report.anything:
        return plan, report

    def all_units() -> Iterator[list[EntryLike]]:
        if first is not None:
            yield first
            yield from units

    # `append_version` reads the report once the units, and with them the diff, are exhausted.
    return append_version(plan, all_units(), report=report, source=source, generation=generation), report
