"""The sampling plan: requests grouped into units of one shape, and which rows of them are still to be drawn.

Pure functions over Arrow tables. A plan only ever grows: the requests a root has planned keep their (unit, row)
for good, new ones are appended as new units. So a unit means the same in every run, the ledger's row ranges stay
valid, and adding requests costs the added ones only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired

import numpy as np
import pyarrow as pa
from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from pipeline.sample.requests import (
    FIELDS,
    MAX_GUIDANCE,
    MAX_SIDE,
    MAX_STEPS,
    MAX_TEXT_BYTES,
    REQUEST_SCHEMA,
    shape_groups,
)
from pipeline.storage.errors import unreadable
from pipeline.storage.stored import parse
from pipeline.store.ledger.layout import PLAN_PARTS
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.plan import Plan, PlannedEntry, append_version

PLAN_SCHEMA = pa.schema(
    [pa.field("unit", pa.int64(), nullable=False), pa.field("row", pa.int64(), nullable=False), *REQUEST_SCHEMA]
)


_Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
_Guidance = Annotated[float, Field(ge=-MAX_GUIDANCE, le=MAX_GUIDANCE)]
_Prompt = Annotated[str, Field(max_length=MAX_TEXT_BYTES)]
_Time = Annotated[float, Field(ge=0, le=1)]


@with_config(ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class StoredRequest(TypedDict):
    """A request as plans and images keep it: FIELDS and `extra`, those that are set."""

    label: NotRequired[Annotated[int, Field(ge=0, lt=1 << 31)] | None]
    prompt: NotRequired[_Prompt | None]
    negative_prompt: NotRequired[_Prompt | None]
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
    height: _Side
    width: _Side
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    guidance: _Guidance
    guidance_low: NotRequired[_Time | None]
    guidance_high: NotRequired[_Time | None]
    extra: NotRequired[_Prompt | None]


REQUEST = TypeAdapter(StoredRequest)


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
        # Equal prompts side by side, each where it is asked for first.
        chosen = new.select(["prompt", "negative_prompt"]).take(pa.array(group)).to_pylist()
        pairs = [(row["prompt"], row["negative_prompt"]) for row in chosen]
        rank = {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}
        group = group[np.argsort([rank[pair] for pair in pairs], kind="stable")]
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


# -- The sampling plan in the store: requests as the plan's entries, one row each, and back again --------------


@dataclass(frozen=True)
class RequestEntry:
    """A request as the store plans it: its id in hex is the key, its content the metadata."""

    key: str
    meta: str
    size_bytes: int = 0
    etag: str | None = None
    mtime_ns: int | None = None
    row_start: int = 0
    row_stop: int = 1


def planned_requests(plan: Plan) -> pa.Table:
    """All requests of a stored plan with their addresses, as PLAN_SCHEMA rows."""
    rows = [request_row(entry) for version in plan.versions for entry in plan.iter_entries(version)]
    return pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)


def request_row(entry: PlannedEntry) -> dict[str, Any]:
    """The request of a planned entry with its address, a row of PLAN_SCHEMA; InputError when it holds none."""
    where = f"the request {entry.key!r} in a part below {PLAN_PARTS}/"
    request = parse(REQUEST, (entry.meta or "{}").encode(), where)
    if not re.fullmatch("[0-9a-f]{32}", entry.key):
        raise unreadable(where, "its key is no request id")
    return {"unit": entry.unit, "row": entry.first_row, "request_id": bytes.fromhex(entry.key), **request}


def freeze_requests(
    plan: Plan, requests: pa.Table, *, unit_requests: int, source: dict[str, Any], generation: int
) -> tuple[Plan, pa.Table]:
    """Append the requests the plan does not hold yet as a new version; (plan, all planned requests)."""
    planned = planned_requests(plan)
    fresh = extend_plan(planned, requests, unit_requests)
    if fresh.num_rows == 0:
        return plan, planned
    units = (
        [
            RequestEntry(
                row["request_id"].hex(),
                json.dumps(
                    {key: row[key] for key in (*FIELDS, "extra") if row[key] is not None},
                    sort_keys=True,
                    separators=(",", ":"),
                ),
            )
            for row in table.to_pylist()
        ]
        for _, table in unit_tables(fresh, planned_rows(fresh))
    )
    plan = append_version(plan, units, source=source, generation=generation)
    return plan, pa.concat_tables([planned, fresh])
