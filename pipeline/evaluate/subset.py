"""Which rows of a source are looked at when not all are: those whose addresses hash lowest.

A row's hash knows only its own address, so the subset is the same on every run, takes from all of a sorted listing
alike, and one subset holds every smaller one. Memory is that of the hashes kept, whatever the source's size.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

from pipeline.source.config import SourceConfig
from pipeline.source.reading.listing import list_entries
from pipeline.source.reading.readers import read_unit
from pipeline.source.reading.rows import EndOfUnit, Entry

_NO_ROW = 1 << 62  # rows from here on: none, but a reader says how many there were
_MOST_RANGES = 256


def rows_in(source: SourceConfig, entry: Entry) -> int:
    """Rows of an entry; of a tar as its headers tell, payloads passed over where the store can seek."""
    if entry.row_stop is not None:
        return entry.row_stop - entry.row_start
    return _counted(source, entry)


@lru_cache(maxsize=1 << 16)
def _counted(source: SourceConfig, entry: Entry) -> int:
    return sum(row.rows for row in read_unit(source, [entry], [(_NO_ROW, None)]) if isinstance(row, EndOfUnit))


def threshold(source: SourceConfig, count: int, above: int = -1) -> int | None:
    """The largest of the `count` smallest hashes over `above`; None when there are no more than `count`."""
    kept: list[int] = []  # a heap of negated hashes: the largest of the smallest is on top
    found = 0
    for value in _hashes(source):
        if value <= above:
            continue
        found += 1
        if len(kept) < count:
            heapq.heappush(kept, -value)
        elif value < -kept[0]:
            heapq.heapreplace(kept, -value)
    return -kept[0] if found > count else None


def _hashes(source: SourceConfig) -> Iterator[int]:
    for entry in list_entries(source):
        for row in range(rows_in(source, entry)):
            yield row_hash(entry, row)


def row_hash(entry: Entry, row: int) -> int:
    """Uniform on 0 .. 2^64 - 1: the hash of the address of an entry's `row`-th row."""
    address = f"{entry.key}\0{entry.row_start + row}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(b"reference\0" + address, digest_size=8).digest(), "big")


def chosen_rows(source: SourceConfig, entries: Iterable[Entry], above: int, upto: int | None) -> list[int]:
    """Ascending rows of the concatenated entries whose hashes lie over `above` and not over `upto` (None: any)."""
    chosen: list[int] = []
    base = 0
    for entry in entries:
        num_rows = rows_in(source, entry)
        for row in range(num_rows):
            value = row_hash(entry, row)
            if above < value and (upto is None or value <= upto):
                chosen.append(base + row)
        base += num_rows
    return chosen


def ranges_over(rows: Sequence[int], most: int = _MOST_RANGES) -> list[tuple[int, int | None]]:
    """At most `most` half-open ranges that hold all of the ascending `rows`; the widest gaps stay out."""
    gaps = [(after - before, i) for i, (before, after) in enumerate(pairwise(rows), 1)]
    cuts = sorted(i for width, i in heapq.nlargest(most - 1, gaps) if width > 1)
    edges = [0, *cuts, len(rows)]
    return [(rows[start], rows[stop - 1] + 1) for start, stop in pairwise(edges) if rows]
