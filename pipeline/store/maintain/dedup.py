"""Exact deduplication: of source rows with equal bytes the first stays, the others become filtered rows.

    row groups --hash, unit, row--> shares of the hashes --> first of each content --> records of filtered rows

Rows are read once. Where they are more than may be compared at a time, whoever reads some of them leaves them below
`scratch/`, sorted by the share that their hash falls into, and each share is then compared by itself: a process holds
its share, and no more. What lies there is garbage once the deduplication has ended, and collected as such.

The order is that of (unit, row); several variants of a source row count as one. The records are written under a
generation of their own, newer than that of any row, so the fold lets them win. Every record stands for itself (each
row it filters has an equal row that stays visible), so a crash between two of them costs nothing: the next run
compares what is still visible. Bytes on disk go with the next compaction and garbage collection.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import Generation, check_newest, latest_number, read_closing
from pipeline.store.ledger.identity import read_identity
from pipeline.store.ledger.layout import SCRATCH, removable
from pipeline.store.ledger.rowset import Int64s, RowSet
from pipeline.store.ledger.state import State, VisibleFile, read_state
from pipeline.store.maintain import Spread, in_turn
from pipeline.store.read.dataset import Dataset
from pipeline.store.read.row_groups import reading_table
from pipeline.store.schema import LATENTS, REJECTS, binary_rows
from pipeline.store.writer import Committer

REASON = "duplicate_content"
MARK = "deduplicated"  # in a closing note: the digest of the rows among which no two are equal

Rows = npt.NDArray[np.void]
Bytes = npt.NDArray[np.uint8]
_COLUMNS = ("content_sha256", "unit", "row")
_ROW = np.dtype([("hash", np.uint64, (4,)), ("address", np.int64), ("group", np.int32)])
_PEAK_ROW_BYTES = 160  # of a row while it is compared: two copies of it, sort keys and their order
_READERS, _READ_WINDOW = 8, 32
_ROWS_PER_COMMIT = 1 << 18
_MESSAGE = "same bytes as unit {} row {}"
_MESSAGE_PATTERN = r"^same bytes as unit (?P<unit>\d+) row (?P<row>\d+)$"


@dataclass(frozen=True)
class DedupReport:
    """What a deduplication did: shares of the hashes compared, data rows read, source rows newly filtered."""

    shares: int
    rows_read: int
    duplicates: int


def deduplicate(
    generation: Generation,
    *,
    source_uri: str,
    memory_bytes: int,
    spread: Spread = in_turn,
    on_group: Callable[[int, int], None] = lambda done, total: None,
) -> DedupReport:
    """Filter every visible source row that has an equal one before it; a second call finds nothing to do.

    Under a generation that holds the dataset and has committed no rows itself. Whoever compares takes `memory_bytes`,
    and the hashes are cut into as many shares as that asks for. on_group hears of row groups read, and compared. The
    generation's closing note will tell that no two of the stored rows are equal. ConflictError when another run takes
    over.
    """
    root = generation.root
    state = read_state(root)
    dataset = Dataset(root, read_identity(root), state)
    committer = Committer(root, generation.number, 1, None, {})
    work = _Work(dataset, committer, source_uri, max(1, memory_bytes // (2 * _PEAK_ROW_BYTES)))
    shares, groups = max(1, -(-dataset.num_rows // work.limit)), len(dataset.row_groups)
    steps, done = groups if shares == 1 else 2 * groups, 0
    parts: dict[int, tuple[_Part, ...]] = {}
    for first, read, written in spread(
        partial(work.partitioner, shares), pieces_of(dataset, work.limit // 2) if shares > 1 else ()
    ):
        generation.check()
        parts[first] = written
        on_group(done := done + read, steps)
    # In the order of their row groups, whoever read them first; where all fits into one, nothing was written.
    columns = list(zip(*(parts[first] for first in sorted(parts)), strict=True)) if parts else [()]
    for number, _ in enumerate(spread(work.comparer, columns), 1):
        generation.check()
        on_group(steps - groups + number * groups // shares, steps)
    final = read_state(root)
    # A run that took over hides these commits: what is visible then may hold equal rows.
    check_newest(root, generation.number)
    generation.summary |= marked(final)
    return DedupReport(shares, dataset.num_rows, _filtered(final).count() - _filtered(state).count())


def is_due(root: Root, state: State) -> bool:
    """Whether the stored rows are others than those the last deduplication left."""
    for number in range(latest_number(root), 0, -1):
        closing = read_closing(root, number)
        if closing is not None and MARK in closing:
            return bool(closing[MARK] != marked(state)[MARK])
    return True


def marked(state: State) -> dict[str, str]:
    """The part of a closing note that says: among these stored rows no two are equal."""
    stored = state.stored
    hasher = hashlib.blake2b(digest_size=16)
    for side in (0, 1):  # all starts, then all stops
        for spans in stored.spans():
            hasher.update(spans[side].astype("<i8").tobytes())
    return {MARK: hasher.hexdigest()}


def released(root: Root, state: State) -> RowSet:
    """Rows that were filtered for the sake of an equal one that is there no longer: they are to be encoded again.

    Only a row whose source changed or went can have left a duplicate behind, so nothing is read without those.
    """
    filtered = _filtered(state)
    if not filtered or not state.plan.retired:
        return RowSet.empty()
    there = state.stored | filtered
    alone = [_left_alone(root, file, there) for file in state.reject_files]
    return RowSet.union_all(alone) & filtered


def _left_alone(root: Root, file: VisibleFile, there: RowSet) -> RowSet:
    """The duplicates of one reject file whose kept row is not among those that are there."""
    with reading_table(root.uri_of(file.info.path)), root.open(file.info.path) as source:
        table = pq.read_table(source, columns=["unit", "row", "reason", "message"], page_checksum_verification=True)
    table = table.filter(pc.equal(table["reason"], REASON))
    if not len(table):
        return RowSet.empty()
    kept = pc.extract_regex(table["message"].combine_chunks(), _MESSAGE_PATTERN)
    units = np.asarray(pc.struct_field(kept, "unit").cast(pa.int64()))
    rows = np.asarray(pc.struct_field(kept, "row").cast(pa.int64()))
    addresses = RowSet.from_rows(table["unit"].to_numpy(), table["row"].to_numpy()) - file.dead
    alone = ~there.contains(units, rows)
    return addresses & RowSet.from_rows(table["unit"].to_numpy()[alone], table["row"].to_numpy()[alone])


def _filtered(state: State) -> RowSet:
    return state.filtered.get(REASON, RowSet.empty())


@dataclass(frozen=True)
class _Part:
    """The rows of one share that lie in an object: bytes [start, stop), with their crc32."""

    key: str
    start: int
    stop: int
    crc: int


@dataclass(frozen=True)
class _Work:
    """One deduplication, picklable: at most about `limit` rows are known, and as many more wait to be compared."""

    dataset: Dataset
    committer: Committer
    source_uri: str
    limit: int

    def partitioner(self, shares: int) -> Callable[[range], tuple[int, int, tuple[_Part, ...]]]:
        """What leaves the rows of row groups in scratch: the first of these, how many they are, a part a share."""
        root, number = self.dataset.root, self.committer.generation

        def partition(groups: range) -> tuple[int, int, tuple[_Part, ...]]:
            tables = scan_columns(self.dataset, _COLUMNS, groups)
            rows = np.concatenate([_rows(table, group) for group, table in zip(groups, tables, strict=True)])
            share = ((rows["hash"][:, 0] >> np.uint64(32)) * np.uint64(shares)) >> np.uint64(32)
            order = np.argsort(share, kind="stable")
            data = rows[order].tobytes()
            ends = (np.searchsorted(share[order], np.arange(shares + 1)) * _ROW.itemsize).tolist()
            key = removable(SCRATCH, data, number, ".rows")
            check_newest(root, number)
            root.put_if_absent(key, data)
            cuts = list(pairwise(ends))
            return groups.start, len(groups), tuple(_Part(key, a, b, zlib.crc32(data[a:b])) for a, b in cuts)

        return partition

    def comparer(self) -> Callable[[Sequence[_Part]], None]:
        """What commits the rows of a share that are not the first, given its parts; given none, of all rows."""

        def compare(parts: Sequence[_Part]) -> None:
            known, waiting = np.zeros(0, _ROW), list[Rows]()
            tables = scan_columns(self.dataset, _COLUMNS) if not parts else iter(())
            scanned = (_rows(table, group) for group, table in enumerate(tables))
            for rows in self._read(parts) if parts else scanned:
                waiting.append(rows)
                if sum(map(len, waiting)) > self.limit:
                    known = self._settle(known, waiting)
            self._settle(known, waiting)

        return compare

    def _read(self, parts: Sequence[_Part]) -> Iterator[Rows]:
        """The rows of some parts, in order, a few at a time."""
        root, most, first, size = self.dataset.root, self.limit * _ROW.itemsize // 2, 0, 0

        def read(part: _Part) -> Rows:
            data = root.read_range(part.key, part.start, part.stop - part.start)
            if zlib.crc32(data) != part.crc:
                raise InputError(
                    f"{root.uri_of(part.key)} does not hold what was written",
                    rule="what a deduplication keeps of the rows that it has read comes back as it was",
                    next_step="see to the store, then run the same command again",
                )
            return np.frombuffer(data, _ROW)

        with ThreadPoolExecutor(_READERS) as pool:
            for at, part in enumerate(parts):
                if size and size + part.stop - part.start > most:
                    yield from pool.map(read, parts[first:at])
                    first, size = at, 0
                size += part.stop - part.start
            yield from pool.map(read, parts[first:])

    def _settle(self, known: Rows, waiting: list[Rows]) -> Rows:
        rows = np.concatenate([known, *waiting])
        waiting.clear()
        known, others, kept = first_of_each(rows)
        for start in range(0, len(others), _ROWS_PER_COMMIT):
            part = slice(start, start + _ROWS_PER_COMMIT)
            self._commit(others[part], kept[part])
        return known

    def _commit(self, others: Rows, kept: Int64s) -> None:
        order = np.argsort(others["address"], kind="stable")
        others, kept = others[order], kept[order]
        # Their source keys, from the row groups that they lie in.
        keys_of = np.full(len(others), "", object)
        for group in np.unique(others["group"]).tolist():
            mine = np.flatnonzero(others["group"] == group)
            table = self.dataset.read(group, ["unit", "row", "key"])
            place = np.searchsorted(others["address"][mine], addresses_of(table)).clip(max=len(mine) - 1)
            hit = np.flatnonzero(others["address"][mine][place] == addresses_of(table))
            keys_of[mine[place[hit]]] = table["key"].take(pa.array(hit)).to_pylist()
        messages = [_MESSAGE.format(address >> 32, address & 0xFFFFFFFF) for address in kept.tolist()]
        outcomes = filtered_rows(others["address"], keys_of.tolist(), self.source_uri, REASON, messages)
        check_newest(self.dataset.root, self.committer.generation)
        self.committer.commit(LATENTS.empty_table(), outcomes, {})


def _rows(table: pa.Table, group: int) -> Rows:
    """The rows of a row group that have a hash."""
    table = table.filter(pc.is_valid(table["content_sha256"]))
    rows = np.zeros(len(table), _ROW)
    if len(table):
        rows["hash"] = hash_rows(table["content_sha256"]).view(">u8")
    rows["address"] = addresses_of(table)
    rows["group"] = group
    return rows


def first_of_each(rows: Rows) -> tuple[Rows, Rows, Int64s]:
    """(the first row of every content, every other row once, the address of the first one each of them equals)."""
    # Few rows share their first 64 bits with another: only these are compared in full.
    prefix = rows["hash"][:, 0]
    order = np.argsort(prefix, kind="stable")
    same = prefix[order][1:] == prefix[order][:-1]
    shared = np.zeros(len(rows), np.bool_)
    shared[order[1:][same]] = True
    shared[order[:-1][same]] = True
    several = rows[shared]
    if not len(several):
        return rows, several, np.zeros(0, np.int64)
    words = several["hash"]
    several = several[np.lexsort((several["address"], *(words[:, i] for i in (3, 2, 1, 0))))]
    new = np.ones(len(several), np.bool_)
    new[1:] = (several["hash"][1:] != several["hash"][:-1]).any(axis=1)
    first = several["address"][new][np.cumsum(new) - 1]
    # Another variant of a row already listed is the same source row.
    again = np.zeros(len(several), np.bool_)
    again[1:] = ~new[1:] & (several["address"][1:] == several["address"][:-1])
    other = (several["address"] != first) & ~again
    return np.concatenate([rows[~shared], several[new]]), several[other], first[other]


def addresses_of(table: pa.Table) -> Int64s:
    address: Int64s = (table["unit"].to_numpy() << 32) + table["row"].to_numpy()
    return address


def hash_rows(column: pa.ChunkedArray) -> Bytes:
    """A fixed-size binary column as uint8 [n, length]; zeros for null."""
    width = column.type.byte_width
    return binary_rows(pc.fill_null(column, b"\0" * width) if column.null_count else column, width)


def scan_columns(dataset: Dataset, columns: Sequence[str], groups: range | None = None) -> Iterator[pa.Table]:
    """Some columns of each row group, or of some in a row; few of them are in memory at a time."""
    groups = range(len(dataset.row_groups)) if groups is None else groups
    with ThreadPoolExecutor(_READERS) as pool:
        for first in range(0, len(groups), _READ_WINDOW):
            yield from pool.map(lambda group: dataset.read(group, columns), groups[first : first + _READ_WINDOW])


def pieces_of(dataset: Dataset, most_rows: int) -> Iterator[range]:
    """All row groups, in pieces of at most so many rows, or of one that has more."""
    first = rows = 0
    for group, count in enumerate(dataset.row_groups.rows.tolist()):
        if rows and rows + count > most_rows:
            yield range(first, group)
            first, rows = group, 0
        rows += count
    yield range(first, len(dataset.row_groups))


def filtered_rows(
    addresses: Int64s, keys: Sequence[str], source_uri: str, reason: str, messages: Sequence[str]
) -> pa.Table:
    outcomes = {
        "unit": addresses >> 32,
        "row": addresses & 0xFFFFFFFF,
        "uri": [f"{source_uri}/{key}" for key in keys],
        "key": keys,
        "outcome": ["filtered"] * len(keys),
        "reason": [reason] * len(keys),
        "message": messages,
    }
    return pa.table(outcomes, schema=REJECTS)
