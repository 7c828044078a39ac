"""Rows out of Parquet files: image bytes, the {bytes, path} struct of Hugging Face datasets, or URIs of images.

    footer -> spans of row groups (the plan)      span -> batches of the needed columns -> filter -> rows

A row's key is "file.parquet#row number in the file". Only needed columns and wanted row groups are read. The parsing
itself is in `parquet_file`, in a child process with limits (`parquet_child`) unless the source says isolate: false.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from pipeline.errors import PipelineError
from pipeline.source.config import ParquetSource
from pipeline.source.reading import parquet_child, parquet_file
from pipeline.source.reading.parquet_file import Item, Span, TableError
from pipeline.source.reading.rows import (
    EndOfUnit,
    Entry,
    Failure,
    Ranges,
    SourceRow,
    failure_of,
    fetch,
    map_ahead,
    open_ranges,
)
from pipeline.source.reasons import Reason
from pipeline.storage.errors import ObjectChanged
from pipeline.storage.root import KeyRefused, ObjectInfo, Root, Version, check_key
from pipeline.storage.stores import RangedFile
from pipeline.storage.trust import key_below, tidy_key

# -- Images that a table only points to: URIs out of data are followed only where the configuration allows it --


class UriReader:
    """Reads relative URIs below the source and absolute ones below the allowed prefixes, nothing else."""

    def __init__(self, root: Root, prefixes: Sequence[str], max_bytes: int) -> None:
        self._root, self._max_bytes = root, max_bytes
        self._roots = {prefix.rstrip("/") + "/": Root(prefix) for prefix in prefixes}

    def read(self, uri: str) -> bytes | Failure:
        """The object's bytes, or why they were not read."""
        prefix = next((prefix for prefix in self._roots if uri.startswith(prefix)), None)
        root, key = self._root, None
        if prefix is not None:
            root, key = self._roots[prefix], key_below(uri, prefix)
        elif not (uri.startswith(("/", "~")) or "://" in uri):
            key = tidy_key(uri)
        try:
            return fetch(root, check_key(key or ""), self._max_bytes)
        except KeyRefused:
            rule = "URIs lie below the source (relative) or below source.uri_prefixes (absolute)"
            return Failure(Reason.URI_REFUSED, f"{uri[:200]}: {rule}")


_log = logging.getLogger(__name__)

_SPAN_ROWS, _SPAN_BYTES = 10_000, 256 << 20


def spans(root: Root, info: ObjectInfo, source: ParquetSource) -> Iterator[tuple[int, int | None, int]]:
    """(first row, row after the last, stored bytes) of runs of row groups; (0, None, size) for a damaged file.

    InputError when a sound file lacks a column that the configuration names.
    """
    try:
        groups = _layout(root, info.key, source, info, info.size_bytes)
    except TableError:
        yield 0, None, info.size_bytes
        return
    start, rows, size = 0, 0, 0
    for group_rows, group_bytes in groups:
        if rows and (rows + group_rows > _SPAN_ROWS or size + group_bytes > _SPAN_BYTES):
            yield start, start + rows, size
            start, rows, size = start + rows, 0, 0
        rows, size = rows + group_rows, size + group_bytes
    if rows:
        yield start, start + rows, size


def read_parquets(
    root: Root, source: ParquetSource, entries: Sequence[Entry], wanted: Ranges
) -> Iterator[SourceRow | EndOfUnit]:
    """Rows of the spans one after the other; a damaged file of unknown length is one rejected row."""
    uris = UriReader(root, source.uri_prefixes, source.max_bytes)

    def resolved(item: Item) -> SourceRow:
        if isinstance(item, SourceRow):
            return item
        row, uri = item
        data = uris.read(uri)
        if isinstance(data, Failure):
            return SourceRow.without_image(row.row, row.key, data.reason, data.message, row.source)
        row.image = data
        return row

    base, unknown = 0, False
    for entry in entries:
        unknown = unknown or entry.row_stop is None
        length = 1 if entry.row_stop is None else entry.row_stop - entry.row_start
        if wanted.meets(base, base + length):
            window = source.read_ahead if source.uri_prefixes or root.local_path() is None else 1
            try:
                yield from map_ahead(resolved, _read_span(root, source, entry, base, wanted), window)
            except ObjectChanged as error:
                _log.warning("%s", error)
                return
        base += length
    if unknown and wanted.open_ended:
        yield EndOfUnit(base)


def table_rows(root: Root, info: ObjectInfo, source: ParquetSource) -> Iterator[Item]:
    """All rows of one file, images not fetched; TableError where it, or a part of it, cannot be read."""
    total = sum(count for count, _ in _layout(root, info.key, source, info, info.size_bytes))
    whole = Entry(info.key, info.size_bytes, info.etag, info.mtime_ns, 0, total, None)
    return _rows(root, source, whole, 0, Ranges([(0, total)]))


def _read_span(root: Root, source: ParquetSource, entry: Entry, base: int, wanted: Ranges) -> Iterator[Item]:
    """The wanted rows of one entry; every row that the file does not give is a rejected one."""
    done = base
    failure = Failure(Reason.CORRUPT_CONTAINER, "the file holds fewer rows than when it was listed")
    try:
        for item in _rows(root, source, entry, base, wanted):
            yield item
            done = (item if isinstance(item, SourceRow) else item[0]).row + 1
    except PipelineError:
        raise
    except TableError as error:
        failure = Failure(error.reason, error.message)
    except Exception as error:  # noqa: BLE001 - stores raise anything; each lost row is accounted for
        failure = failure_of(error)
    length = 1 if entry.row_stop is None else entry.row_stop - entry.row_start
    for row in range(done, base + length):
        if row in wanted:
            key = f"{entry.key}#{entry.row_start + row - base}"
            yield SourceRow.without_image(row, key, failure.reason, failure.message, source.name)


def _layout(
    root: Root, key: str, source: ParquetSource, version: Version, size_bytes: int | None = None
) -> list[tuple[int, int]]:
    where = root.uri_of(key)
    with open_ranges(root, key, version, size_bytes) as (read, size):
        if source.isolate:
            return parquet_child.layout(read, size, source, where)
        with RangedFile(read, size, whole=False) as file:
            return parquet_file.layout(file, source, where)


def _rows(root: Root, source: ParquetSource, entry: Entry, base: int, wanted: Ranges) -> Iterator[Item]:
    if entry.row_stop is None:  # it was damaged when it was listed: whatever it holds now was not planned
        _layout(root, entry.key, source, entry)
        raise TableError(
            Reason.CORRUPT_CONTAINER, "the file was not readable when it was listed; list the source again"
        )
    where = root.uri_of(entry.key)
    span = Span(entry.key, entry.row_start, entry.row_stop, base, wanted.pairs)
    with open_ranges(root, entry.key, entry) as (read, size):
        if source.isolate:
            yield from parquet_child.rows(read, size, source, where, span)
            return
        with RangedFile(read, size, whole=False) as file:
            yield from parquet_file.rows(file, source, where, span)
