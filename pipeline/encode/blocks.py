"""The Arrow tables that travel between the stages of the encode job, and the ways between rows and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.source.reading.rows import EndOfUnit, SourceRow
from pipeline.store.write.schema import LATENTS, REJECTS

# What read tasks yield: compressed bytes, never pixels. `unit_rows` is set on the marker that ends a unit
# whose length was unknown; such a marker has row -1 and no image.
RAW = pa.schema(
    [
        pa.field("unit", pa.int64(), False),
        pa.field("row", pa.int64(), False),
        pa.field("source", pa.string(), False),
        pa.field("key", pa.string(), False),
        pa.field("image", pa.large_binary()),
        pa.field("caption", pa.string()),
        pa.field("label", pa.int64()),
        pa.field("extra", pa.string()),
        pa.field("exif_orientation", pa.int32()),
        pa.field("status", pa.string(), False),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
        pa.field("unit_rows", pa.int64()),
    ]
)

# What encoders yield: latents where outcome is "stored"; else why there are none. `variants` is how many rows
# the source row has become. The outcome "end" marks the end of a unit.
ENCODED = pa.schema(
    [f.with_nullable(True) for f in LATENTS]
    + [
        pa.field("outcome", pa.string(), False),
        pa.field("variants", pa.int32(), False),
        pa.field("uri", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
        pa.field("unit_rows", pa.int64()),
    ]
)

_ROW_FIELDS = ("row", "source", "key", "image", "caption", "label", "extra", "exif_orientation", "status")


def raw_table(unit: int, items: Sequence[SourceRow | EndOfUnit]) -> pa.Table:
    """One block of what a reader yielded for a unit."""
    return pa.Table.from_pylist([_raw_row(unit, item) for item in items], schema=RAW)


def _raw_row(unit: int, item: SourceRow | EndOfUnit) -> dict[str, Any]:
    if isinstance(item, EndOfUnit):
        return {"unit": unit, "row": -1, "source": "", "key": "", "status": "end", "unit_rows": item.rows}
    values = {name: getattr(item, name) for name in _ROW_FIELDS}
    return {"unit": unit, **values, "reason": item.reason and str(item.reason), "message": item.message}


def source_row(values: dict[str, Any]) -> SourceRow:
    """The row in one line of a RAW table."""
    fields = {name: values[name] for name in (*_ROW_FIELDS, "reason", "message")}
    return SourceRow(**fields)


def split_outcomes(table: pa.Table) -> tuple[pa.Table, pa.Table, dict[int, int]]:
    """(LATENTS rows with their `variants`, REJECTS rows, rows of units that ended) of an ENCODED table."""
    stored = table.filter(pc.equal(table["outcome"], "stored"))
    others = table.filter(pc.is_in(table["outcome"], pa.array(["rejected", "filtered"])))
    ends = table.filter(pc.equal(table["outcome"], "end"))
    unit_rows = dict(zip(ends["unit"].to_pylist(), ends["unit_rows"].to_pylist(), strict=True))
    return stored.select([*LATENTS.names, "variants"]), others.select(REJECTS.names).cast(REJECTS), unit_rows
