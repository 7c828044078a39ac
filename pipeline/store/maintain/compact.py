"""Compaction: fragments in the order of arrival become shards in unit order, by ordinary commit records.

The plan and the mean size of a settled row decide which rows a shard holds, so shards do not depend on how the encode
job was scheduled. The mean counts in steps of a seventh to a quarter: the little by which it moves when images come
in leaves the shards that are there as they are, but for the rare time that it passes a step, and all are made anew.
Shards begin and end with a unit, but for a unit too large for one: it is cut into equal parts. A
shard's record has a newer generation than its fragments', so its rows take their place at once, shard by shard.
Fragments stay in storage until garbage collection is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.store.ledger.generation import Generation
from pipeline.store.ledger.identity import read_identity
from pipeline.store.ledger.rowset import RowSet, address, unit_of
from pipeline.store.ledger.state import State, read_state
from pipeline.store.read.dataset import Dataset
from pipeline.store.writer import ROW_BYTES, Committer

# Where rows are small, as where pictures lie in files of their own: texts of 16 KiB each still fit 32-bit offsets.
_MAX_ROWS = 1 << 16

Span = tuple[int, int]  # half-open, of address integers as a RowSet holds them


@dataclass(frozen=True)
class CompactReport:
    """What a compaction did."""

    shards_written: int
    shards_kept: int
    rows_moved: int
    bytes_written: int


def compact(
    generation: Generation,
    *,
    shard_bytes: int,
    row_group_bytes: int,
    workers: int = 1,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
) -> CompactReport:
    """Rewrite what is not yet in full shards, under a generation that holds the dataset; a second call does nothing.

    ConflictError when another run takes over. Memory: about three shards a worker.
    """
    root = generation.root
    identity = read_identity(root)
    dataset = Dataset(root, identity, read_state(root))
    spans, todo = shards_to_write(dataset, shard_bytes)
    committer = Committer(
        root,
        generation.number,
        row_group_bytes,
        identity.fingerprint.get("latent_dtype"),
        {"latentloom.generation": str(generation.number)},
    )

    def write(span: Span) -> tuple[int, int]:
        generation.check()
        return _write_shard(dataset, committer, span)

    shards = moved = written = 0
    with ThreadPoolExecutor(workers) as pool:
        for done, (rows, size) in enumerate(pool.map(write, todo), 1):
            shards, moved, written = shards + (rows > 0), moved + rows, written + size
            on_shard(done, len(todo))
    return CompactReport(shards, spans - len(todo), moved, written)


def shards_to_write(dataset: Dataset, shard_bytes: int) -> tuple[int, list[Span]]:
    """How many shards a compact dataset has, and which of them are not yet there."""
    spans, layout = list(shard_spans(dataset, shard_bytes)), _Layout(dataset.state)
    return len(spans), [span for span in spans if not layout.is_compact(span)]


def shard_spans(dataset: Dataset, shard_bytes: int) -> Iterator[Span]:
    """Half-open ranges of row addresses that make up one shard each: a function of the plan and the mean row."""
    if not dataset.num_rows:
        return
    rows_per_shard = _rows_per_shard(dataset, shard_bytes)
    units, planned = dataset.state.plan.unit_lengths()
    first, rows = 0, 0
    for unit, length in zip(units.tolist(), planned.tolist(), strict=True):
        length = dataset.state.unit_rows.get(unit, 0) if length < 0 else length
        if rows and rows + length > rows_per_shard:
            yield first, address(unit)
            first, rows = address(unit), 0
        parts = -(-length // rows_per_shard)
        for part in range(1, parts):
            cut = address(unit) + part * length // parts
            yield first, cut
            first = cut
        rows += length if parts < 2 else length - (parts - 1) * length // parts
    yield first, address(len(units))


def _rows_per_shard(dataset: Dataset, shard_bytes: int) -> int:
    """Settled source rows of a shard: rejected and filtered ones take no space, variants take theirs.

    Dead rows do not count for the mean: how often a write was repeated, and what was already compacted away, must not
    move the ends of shards.
    """
    groups = dataset.row_groups
    blobs = int((groups.size_bytes * groups.rows // np.maximum(groups.stored("rows"), 1)).sum())
    mean = (blobs + ROW_BYTES * dataset.num_rows) / dataset.state.covered.count()
    most = max(1, min(int(shard_bytes / mean), _MAX_ROWS * dataset.state.covered.count() // dataset.num_rows))
    step = 1 << max(0, most.bit_length() - 3)
    return most // step * step


class _Layout:
    """Which files lie in a span of rows; asking costs the files found, not all there are."""

    def __init__(self, state: State) -> None:
        files = [f for f in state.files if len(f.info.row_groups)]
        first = np.array([f.info.row_groups.first_unit.min() for f in files], np.int64)
        order = np.argsort(first, kind="stable")
        self._files = [files[i] for i in order]
        self._first = first[order]
        self._last = np.array([f.info.row_groups.last_unit.max() for f in self._files], np.int64)
        self._reach = np.maximum.accumulate(self._last) if len(files) else self._last

    def is_compact(self, span: Span) -> bool:
        """Whether a span lies in at most one file without dead rows, and that file holds nothing else."""
        low = np.searchsorted(self._reach, unit_of(span[0]))
        high = np.searchsorted(self._first, unit_of(span[1] - 1), side="right")
        rows = RowSet.from_keys(np.array([span[0]]), np.array([span[1]]))
        near = low + np.flatnonzero(self._last[low:high] >= unit_of(span[0]))
        held = [(self._files[i], self._files[i].record.stored) for i in near.tolist()]
        # Dead rows do not put a file into a span: what a killed compaction has written is not written again.
        inside = [(file, stored) for file, stored in held if (stored - file.dead) & rows]
        return len(inside) < 2 and all(not file.dead and not (stored - rows) for file, stored in inside)


def rows_in_span(dataset: Dataset, span: Span) -> pa.Table | None:
    """The visible rows of a span, whatever files they lie in; None when there are none."""
    (start, stop), tables = span, []
    for index, info in dataset.groups_within(unit_of(start), unit_of(stop - 1) + 1):
        if start <= address(info.first_unit) and address(info.last_unit + 1) <= stop:
            tables.append(dataset.read(index, None))
            continue
        # A row group at the ends of the span is read in full only if it holds any of its rows.
        where = dataset.read(index, ["unit", "row"])
        keys = address(where["unit"].to_numpy()) + where["row"].to_numpy()
        inside = (keys >= start) & (keys < stop)
        if inside.any():
            tables.append(dataset.read(index, None).filter(pa.array(inside)))
    return pa.concat_tables(tables) if tables else None


def _write_shard(dataset: Dataset, committer: Committer, span: Span) -> tuple[int, int]:
    """(rows, bytes) of the shard written for a span of rows; nothing is written when none of them is visible."""
    rows = rows_in_span(dataset, span)
    if rows is None:
        return 0, 0
    record = committer.commit(rows, None, {})
    return (0, 0) if record is None else (len(rows), sum(f.size_bytes for f in record.files))
