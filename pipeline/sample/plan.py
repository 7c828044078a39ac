"""The sampling plan: requests grouped into units of one shape, and which rows of them are still to be drawn.

Pure functions over Arrow tables. A plan only ever grows: the requests a root has planned keep their (unit, row)
for good, new ones are appended as new units. So a unit means the same in every run, the ledger's row ranges stay
valid, and adding requests costs the added ones only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from pipeline.sample.requests import REQUEST_SCHEMA
from pipeline.store.ledger.rowset import RowSet

PLAN_SCHEMA = pa.schema(
    [pa.field("unit", pa.int64(), nullable=False), pa.field("row", pa.int64(), nullable=False), *REQUEST_SCHEMA]
)
SHAPE_KEY = ("height", "width", "steps", "guidance", "guidance_low", "guidance_high")


def shape_groups(requests: pa.Table) -> Iterator[np.ndarray]:
    """Row indices (int64 [n]) of each group that shares size, steps and guidance, in a fixed order of groups.

    Within a group the order of the table is kept. The batches of one group have one shape and one schedule.
    """
    if requests.num_rows == 0:
        return
    keys = [requests[name].to_pylist() for name in SHAPE_KEY]
    groups: dict[tuple[float | None, ...], list[int]] = {}
    for i, key in enumerate(zip(*keys, strict=True)):
        groups.setdefault(key, []).append(i)
    for key in sorted(groups, key=lambda k: [(v is None, v or 0.0) for v in k]):
        yield np.asarray(groups[key], dtype=np.int64)


def extend_plan(planned: pa.Table | None, requests: pa.Table, unit_requests: int) -> pa.Table:
    """The plan rows (PLAN_SCHEMA) of the requests that `planned` does not hold yet; empty when it holds all.

    New units are numbered on from the last planned one and hold at most `unit_requests` rows each. Of one shape,
    requests with equal prompts come one after the other, so that an embedding is needed once and then no more.
    """
    if unit_requests < 1:
        raise ValueError(f"unit_requests {unit_requests}: a unit holds at least one request")
    known: set[bytes] = set()
    unit = 0
    if planned is not None and planned.num_rows:
        known = set(planned["request_id"].to_pylist())
        unit = 1 + int(np.max(planned["unit"].to_numpy()))
    fresh = [i for i, name in enumerate(requests["request_id"].to_pylist()) if name not in known]
    new = requests.take(pa.array(fresh, pa.int64()))
    order: list[np.ndarray] = []
    units: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    for group in shape_groups(new):
        group = _prompts_together(new, group)
        for start in range(0, len(group), unit_requests):
            part = group[start : start + unit_requests]
            order.append(part)
            units.append(np.full(len(part), unit, dtype=np.int64))
            rows.append(np.arange(len(part), dtype=np.int64))
            unit += 1
    if not order:
        return PLAN_SCHEMA.empty_table()
    table = new.take(pa.array(np.concatenate(order)))
    columns = [pa.array(np.concatenate(units)), pa.array(np.concatenate(rows)), *table.columns]
    return pa.table(columns, schema=PLAN_SCHEMA)


def _prompts_together(requests: pa.Table, group: np.ndarray) -> np.ndarray:
    """A group's row indices with equal prompts side by side, each prompt where it is asked for first."""
    chosen = requests.select(["prompt", "negative_prompt"]).take(pa.array(group)).to_pylist()
    pairs = [(row["prompt"], row["negative_prompt"]) for row in chosen]
    rank = {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}
    return group[np.argsort([rank[pair] for pair in pairs], kind="stable")]


def planned_rows(plan: pa.Table, wanted: Iterable[bytes] | None = None) -> RowSet:
    """The addresses of a plan's rows; with `wanted`, of those requests only."""
    units, rows = plan["unit"].to_numpy(), plan["row"].to_numpy()
    if wanted is None:
        return RowSet.from_rows(units, rows)
    names = set(wanted)
    chosen = np.fromiter((n in names for n in plan["request_id"].to_pylist()), dtype=bool, count=len(units))
    return RowSet.from_rows(units[chosen], rows[chosen])


def unit_tables(plan: pa.Table, pending: RowSet) -> Iterator[tuple[int, pa.Table]]:
    """Each unit with pending rows, ascending, and the plan rows of those addresses by row."""
    units, rows = plan["unit"].to_numpy(), plan["row"].to_numpy()
    open_rows = np.flatnonzero(pending.contains(units, rows))
    open_rows = open_rows[np.lexsort((rows[open_rows], units[open_rows]))]
    starts = np.flatnonzero(np.diff(units[open_rows], prepend=-1))
    for part in np.split(open_rows, starts[1:]) if len(open_rows) else []:
        yield int(units[part[0]]), plan.take(pa.array(part))
