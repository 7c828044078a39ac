"""One write: a fragment of rows, its rejects, and the commit record that makes both visible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.storage.root import Root
from pipeline.store.ledger import layout
from pipeline.store.ledger.ledger import commit
from pipeline.store.ledger.record import CommitRecord, FileInfo
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.write.schema import REJECTS
from pipeline.store.write.shard import write_rejects, write_shard


@dataclass(frozen=True)
class Committer:
    """Commits rows under one generation; picklable, safe to call again with the same rows."""

    root: Root
    generation: int
    row_group_bytes: int
    latent_dtype: str | None
    meta: Mapping[str, str]

    def commit(self, rows: pa.Table, outcomes: pa.Table | None, unit_rows: Mapping[int, int]) -> CommitRecord | None:
        """Make rows and outcomes (rejected and filtered rows) visible together.

        With a column `variants` (how many rows a source row has become), a source row counts as settled only when
        all of them are here; an incomplete one is left out, stays a gap, and is done again. A repeated row is kept
        once. Returns None when there is nothing to commit. Raises ValueError for a row that is stored and left out,
        ConflictError when a newer generation fences this one off, and what the store raises (outcome unknown:
        commit again).
        """
        rows = complete_rows(rows)
        outcomes = REJECTS.empty_table() if outcomes is None else outcomes
        stored = RowSet.from_rows(rows["unit"].to_numpy(), rows["row"].to_numpy())
        settled = RowSet.from_rows(outcomes["unit"].to_numpy(), outcomes["row"].to_numpy())
        if stored & settled:
            raise ValueError(f"rows are both stored and left out: {(stored & settled).triples()[:5]}")
        if not stored and not settled and not unit_rows:
            return None
        files: tuple[FileInfo, ...] = ()
        if len(rows):
            files = (
                write_shard(
                    self.root,
                    layout.DATA,
                    rows,
                    row_group_bytes=self.row_group_bytes,
                    latent_dtype=self.latent_dtype,
                    meta=dict(self.meta),
                    generation=self.generation,
                ),
            )
        record = CommitRecord(
            generation=self.generation,
            covered=stored | settled,
            files=files,
            reject_file=write_rejects(self.root, layout.REJECTS, outcomes, self.generation),
            rejects=_by_reason(outcomes, "rejected"),
            filtered=_by_reason(outcomes, "filtered"),
            unit_rows=dict(unit_rows),
        )
        commit(self.root, record)
        return record


def complete_rows(rows: pa.Table) -> pa.Table:
    """Each (unit, row, variant) once, without the source rows whose `variants` are not all here."""
    if not len(rows):
        return rows.drop_columns(["variants"]) if "variants" in rows.column_names else rows
    address = (rows["unit"].to_numpy() << 32) + rows["row"].to_numpy()
    pairs = np.stack([address, rows["variant"].to_numpy().astype(np.int64)])
    _, first = np.unique(pairs, axis=1, return_index=True)
    if len(first) < len(rows):
        rows, address = rows.take(pa.array(np.sort(first))), address[np.sort(first)]
    if "variants" not in rows.column_names:
        return rows
    wanted = rows["variants"].to_numpy()
    if wanted.max() > 1:
        _, inverse, counts = np.unique(address, return_inverse=True, return_counts=True)
        rows = rows.filter(pa.array(counts[inverse] == wanted))
    return rows.drop_columns(["variants"])


def _by_reason(outcomes: pa.Table, outcome: str) -> dict[str, RowSet]:
    chosen = outcomes.filter(pc.equal(outcomes["outcome"], outcome))
    return {
        reason: RowSet.from_rows(part["unit"].to_numpy(), part["row"].to_numpy())
        for reason in sorted(set(chosen["reason"].to_pylist()))
        for part in [chosen.filter(pc.equal(chosen["reason"], reason))]
    }
