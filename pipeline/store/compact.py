"""Compaction: fragments in the order of arrival become shards in unit order, by ordinary commit records.

The plan alone decides which units a shard holds, so shards do not depend on how the encode job was scheduled. A
shard's record has a newer generation than its fragments', so its rows take their place at once, shard by shard.
Fragments stay in storage until garbage collection is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.storage import Root
from pipeline.store.dataset import Dataset
from pipeline.store.generation import claim_next
from pipeline.store.identity import read_identity
from pipeline.store.ledger import collect
from pipeline.store.rowset import MAX_ROWS, RowSet
from pipeline.store.state import State, read_state
from pipeline.store.writer import Committer


@dataclass(frozen=True)
class CompactReport:
    """What a compaction did."""

    shards_written: int
    shards_kept: int
    rows_moved: int
    bytes_written: int


def compact(
    uri: str,
    *,
    shard_bytes: int,
    row_group_bytes: int,
    workers: int = 1,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
) -> CompactReport:
    """Rewrite what is not yet in full shards; a second call finds nothing to do.

    Raises ConflictError while another run writes the dataset. Memory: about three shards a worker.
    """
    root = Root(uri)
    identity = read_identity(root)
    generation = claim_next(root, lambda previous: collect(root, previous), job="compact")
    try:
        state = read_state(root)
        spans = list(shard_spans(state, shard_bytes))
        layout = _Layout(state)
        todo = [span for span in spans if not layout.is_compact(span)]
        dataset = Dataset(root, identity, state)
        committer = Committer(
            root,
            generation.number,
            row_group_bytes,
            identity.fingerprint.get("latent_dtype"),
            {"latentloom.generation": str(generation.number)},
        )

        def write(span: tuple[int, int]) -> tuple[int, int]:
            generation.check()
            return _write_shard(dataset, committer, span)

        moved = written = 0
        with ThreadPoolExecutor(workers) as pool:
            for done, (rows, size) in enumerate(pool.map(write, todo), 1):
                moved, written = moved + rows, written + size
                on_shard(done, len(todo))
        generation.close({"status": "done"})
        return CompactReport(len(todo), len(spans) - len(todo), moved, written)
    finally:
        generation.abandon()


def shard_spans(state: State, shard_bytes: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of units whose rows make up one shard each: a function of the plan and the mean row."""
    stored_bytes = sum(int(f.info.row_groups.size_bytes.sum()) for f in state.files)
    stored_rows = sum(f.info.rows for f in state.files)
    if not stored_rows:
        return
    rows_per_shard = max(1, shard_bytes * stored_rows // max(stored_bytes, 1))
    units, planned = state.plan.unit_lengths()
    first, rows = 0, 0
    for unit, length in zip(units.tolist(), planned.tolist(), strict=True):
        length = state.unit_rows.get(unit, 0) if length < 0 else length
        if rows and rows + length > rows_per_shard:
            yield first, unit
            first, rows = unit, 0
        rows += length
    yield first, len(units)


def _span_rows(span: tuple[int, int]) -> RowSet:
    units = np.arange(span[0], span[1], dtype=np.int64)
    return RowSet.from_arrays(units, np.zeros_like(units), np.full_like(units, MAX_ROWS))


class _Layout:
    """Which files lie in a span of units; asking costs the files found, not all there are."""

    def __init__(self, state: State) -> None:
        files = [f for f in state.files if len(f.info.row_groups)]
        first = np.array([f.info.row_groups.first_unit.min() for f in files], np.int64)
        order = np.argsort(first, kind="stable")
        self._files = [files[i] for i in order]
        self._first = first[order]
        self._last = np.array([f.info.row_groups.last_unit.max() for f in self._files], np.int64)
        self._reach = np.maximum.accumulate(self._last) if len(files) else self._last

    def is_compact(self, span: tuple[int, int]) -> bool:
        """Whether a span lies in at most one file without dead rows, and that file holds nothing else."""
        low, high = np.searchsorted(self._reach, span[0]), np.searchsorted(self._first, span[1])
        inside = [i for i in range(low, high) if self._last[i] >= span[0] and self._touches(i, span)]
        if len(inside) > 1:
            return False
        return all(
            span[0] <= self._first[i] and self._last[i] < span[1] and not (self._files[i].dead & _span_rows(span))
            for i in inside
        )

    def _touches(self, index: int, span: tuple[int, int]) -> bool:
        groups = self._files[index].info.row_groups
        return bool(((groups.first_unit < span[1]) & (groups.last_unit >= span[0])).any())


def _write_shard(dataset: Dataset, committer: Committer, span: tuple[int, int]) -> tuple[int, int]:
    """(rows, bytes) of the shard written for a span of units."""
    tables = []
    for index, info in dataset.groups_within(*span):
        table = dataset.read(index, None)
        if info.first_unit < span[0] or info.last_unit >= span[1]:
            inside = pc.and_(pc.greater_equal(table["unit"], span[0]), pc.less(table["unit"], span[1]))
            table = table.filter(inside)
        tables.append(table)
    if not tables:
        return 0, 0
    rows = pa.concat_tables(tables)
    record = committer.commit(rows, None, {})
    return (0, 0) if record is None else (len(rows), sum(f.size_bytes for f in record.files))
