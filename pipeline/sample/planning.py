"""The sampling plan in the store: requests as the plan's entries, one row each, and back again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.sample.plan import PLAN_SCHEMA, extend_plan, planned_rows, unit_tables
from pipeline.sample.requests import FIELDS
from pipeline.store.plan.plan import Plan, append_version


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
    rows = [
        {
            "unit": entry.unit,
            "row": entry.first_row,
            "request_id": bytes.fromhex(entry.key),
            **json.loads(entry.meta or "{}"),
        }
        for version in plan.versions
        for entry in plan.iter_entries(version)
    ]
    return pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)


def freeze_requests(
    plan: Plan, requests: pa.Table, *, unit_requests: int, source: dict[str, Any], generation: int
) -> tuple[Plan, pa.Table]:
    """Append the requests the plan does not hold yet as a new version; (plan, all planned requests)."""
    planned = planned_requests(plan)
    fresh = extend_plan(planned, requests, unit_requests)
    if fresh.num_rows == 0:
        return plan, planned
    plan = append_version(plan, _units(fresh), source=source, generation=generation)
    return plan, pa.concat_tables([planned, fresh])


def _units(fresh: pa.Table) -> Iterator[list[RequestEntry]]:
    for _, table in unit_tables(fresh, planned_rows(fresh)):
        yield [RequestEntry(row["request_id"].hex(), _meta(row)) for row in table.to_pylist()]


def _meta(row: dict[str, Any]) -> str:
    content = {key: row[key] for key in (*FIELDS, "extra") if row[key] is not None}
    return json.dumps(content, sort_keys=True, separators=(",", ":"))
