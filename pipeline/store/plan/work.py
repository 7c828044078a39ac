"""The gaps of a plan as units of work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.store.ledger.rowset import MAX_ROWS, RowSet


@dataclass(frozen=True)
class Work:
    """Rows of one unit that are still to be done; a stop of None means "to its end"."""

    unit: int
    ranges: tuple[tuple[int, int | None], ...]


def work_of(gaps: RowSet, units_per_execution: int) -> Iterator[list[Work]]:
    """The gaps as work in unit order, cut into executions."""
    batch: list[Work] = []
    unit = -1
    ranges: list[tuple[int, int | None]] = []
    for u, start, stop in gaps.triples():
        if u != unit:
            if ranges:
                batch.append(Work(unit, tuple(ranges)))
            if len(batch) >= units_per_execution:
                yield batch
                batch = []
            unit, ranges = u, []
        ranges.append((start, None if stop >= MAX_ROWS else stop))
    if ranges:
        batch.append(Work(unit, tuple(ranges)))
    if batch:
        yield batch
