"""Samples of skipped steps, as Parquet that anybody can read: one row for each sample and step.

    sample_id binary(16) | step int64, counted from 0 | images int64, after the step | loss, grad_norm float64
    dataset string, the URI of the sample's dataset: only where the run learns from several

One object a start of the job, `quarantine/<generation>.parquet`, replaced as a whole, atomically, at every skip; the
newest start's holds all rows that count. It begins with those of the start before it, without the steps that it is
about to repeat: a start that was superseded writes where nobody looks any more.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.storage.root import Root

QUARANTINE = "quarantine"
_BEFORE = "quarantine.parquet"  # the one object of earlier releases
SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.binary(16), False),
        pa.field("step", pa.int64(), False),
        pa.field("images", pa.int64(), False),
        pa.field("loss", pa.float64(), False),
        pa.field("grad_norm", pa.float64(), False),
    ]
)
MIXED = SCHEMA.append(pa.field("dataset", pa.string(), False))


class Quarantine:
    """The quarantine of one start of a run."""

    def __init__(self, root: Root, generation: int = 0) -> None:
        self.root, self.key = root, f"{QUARANTINE}/{generation:06d}.parquet"
        self.rows = read_quarantine(root)

    def rewind(self, step: int) -> None:
        """Drop what was recorded at `step` and later."""
        kept = self.rows.filter(pc.less(self.rows["step"], step))
        if len(self.rows):
            self._put(kept)

    def add(self, skipped: Mapping[str, Any]) -> None:
        """The samples of one skipped step: step, images, loss, grad_norm, sample_ids in hex, of several a dataset."""
        ids = [bytes.fromhex(name) for name in skipped["sample_ids"]]
        schema = MIXED if "dataset" in skipped else SCHEMA
        shared = {name: [skipped[name]] * len(ids) for name in schema.names if name != "sample_id"}
        new = pa.table({"sample_id": ids, **shared}, schema=schema)
        self._put(pa.concat_tables([self.rows, new]) if len(self.rows) else new)

    def _put(self, rows: pa.Table) -> None:
        self.rows = rows
        sink = io.BytesIO()
        pq.write_table(rows, sink, compression="zstd", write_page_checksum=True)
        self.root.put(self.key, sink.getvalue())


def read_quarantine(root: Root) -> pa.Table:
    """All samples of skipped steps, as the newest start knows them; an empty table when no step was skipped."""
    newest = max((info.key for info in root.list(QUARANTINE)), default=_BEFORE)
    try:
        data = root.read_bytes(newest)
    except FileNotFoundError:
        return SCHEMA.empty_table()
    return pq.read_table(io.BytesIO(data), page_checksum_verification=True)
