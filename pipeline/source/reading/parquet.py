"""Rows out of Parquet files: image bytes, the {bytes, path} struct of Hugging Face datasets, or URIs of images.

    footer -> spans of row groups (the plan)      span -> batches of the needed columns -> filter -> rows

A row's key is "file.parquet#row number in the file". Only needed columns and wanted row groups are read. The parsing
itself is in `parquet_file`, in a child process unless the source says isolate: false, so that no file can crash, hang
or bloat the process that asks:

    parent  --task: file size, source, span-->  child
            <--"read" offset, length-- ... --bytes-->        every byte comes from the parent, with its retries
            <--"row" ... , "layout", "refused", "damaged", "failed", "end"--

In the same child are read the cells of a whole file, of any columns (`table_cells`: "cells" instead of rows), and the
metadata files of folders (`metadata_lines`: "lines"), both also of the text files that `text_file` reads.

The child has no store and no credentials of its own. It is ended by its alarm when no row comes after _CPU_S seconds
of CPU, and by the parent when it is silent for ten times as long. Its end becomes a TableError.
"""

from __future__ import annotations

import atexit
import json
import logging
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import pyarrow as pa

from pipeline.errors import InputError, PipelineError
from pipeline.source.config import FolderSource, ParquetSource
from pipeline.source.pixels.child_process import Child, Pool, alarms, limited_pipes, read_exactly, read_header, send
from pipeline.source.reading import parquet_file, text_file
from pipeline.source.reading.parquet_file import Item, Span, TableError
from pipeline.source.reading.rows import (
    EndOfUnit,
    Entry,
    Failure,
    Ranges,
    ReadRange,
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

_WHOLE_MEMORY_MB = 4096  # of a child that reads a file as a whole
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


@dataclass(frozen=True)
class Cells:
    """The rows of a file: columns by their own names, of equal length, and by row (from 1) what is broken.

    A broken row has None in every column.
    """

    columns: dict[str, list[Any]]
    broken: dict[int, str] = field(default_factory=dict)


def table_cells(root: Root, key: str, kind: str, *, max_rows: int, max_bytes: int) -> Cells:
    """All of one "parquet", "csv" or "jsonl" file, with values as JSON has them; of equal texts one is in memory.

    max_bytes: of all values as JSON. Read in a child, whatever the file. TableError where it cannot be read, or is
    larger than it may be.
    """
    found = Cells({})
    one: dict[str, str] = {}
    done = 0
    with open_ranges(root, key, root.info(key)) as (read, size):
        for message, _ in _run(read, _WHOLE_MEMORY_MB, {"size": size, "cells": [kind, max_rows, max_bytes]}):
            with _an_answer():
                for name, (text, places) in message["columns"].items():
                    values = [one.setdefault(v, v) if isinstance(v, str) else v for v in json.loads(text)]
                    column = found.columns.setdefault(name, [])
                    column += [None] * (done - len(column))  # lines of JSON before may have lacked it
                    column += [values[place] for place in places]
                found.broken.update({done + int(row) + 1: str(why) for row, why in message["broken"].items()})
                done += int(message["rows"])
    for column in found.columns.values():
        column += [None] * (done - len(column))
    return found


def metadata_lines(
    root: Root, info: ObjectInfo, kind: text_file.Kind, source: FolderSource
) -> Iterator[tuple[list[text_file.Metadata], list[str]]]:
    """`text_file.metadata` of one file, read in a child; InputError or TableError where it is none."""
    task = {"where": root.uri_of(info.key), "source": source.model_dump_json(exclude_unset=True), "lines": kind}
    with open_ranges(root, info.key, info) as (read, size):
        for message, _ in _run(read, _WHOLE_MEMORY_MB, {"size": size, **task}):
            with _an_answer():
                lines = [
                    (int(number), name, str(meta), None if problem is None else str(problem))
                    for number, name, meta, problem in message["lines"]
                ]
                names = [str(name) for name in message["fields"]]
            yield lines, names


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
            groups: list[tuple[int, int]] = []
            task = {"size": size, "where": where, "source": _told(source), "span": None}
            for message, _ in _run(read, source.memory_mb, task):
                groups = [(rows, stored) for rows, stored in message["groups"]]
            return groups
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
            task = {"size": size, "where": where, "source": _told(source), "span": asdict(span)}
            for message, image in _run(read, source.memory_mb, task):
                row = SourceRow(image=image, **message["row"])
                yield row if message["uri"] is None else (row, message["uri"])
            return
        with RangedFile(read, size, whole=False) as file:
            yield from parquet_file.rows(file, source, where, span)


# -- the child, as its parent sees it -----------------------------------------------------------------------------


Message = tuple[dict[str, Any], bytes | None]  # a header, and the image of a row

_CPU_S = 60.0
_SILENCE_S = 600.0
_REQUEST_BYTES = 8 << 20
_ROW_FIELDS = tuple(f.name for f in fields(SourceRow) if f.name != "image")


def _told(source: ParquetSource) -> str:
    return source.model_dump_json(exclude_unset=True)


def _run(read: ReadRange, memory_mb: int, task: dict[str, Any]) -> Iterator[Message]:
    """What a child answers; also raises TableError for a timeout, a crash or too much memory."""
    child, finished = children.take(memory_mb), False
    broken: Exception | None = None
    try:
        child.send(task, [])
        while not finished:
            message = child.receive_header(time.monotonic() + _SILENCE_S)
            kind = message["kind"]
            if kind == "read":
                try:
                    data = read(message["start"], min(message["length"], _REQUEST_BYTES))
                except Exception as error:  # noqa: BLE001 - stores raise anything; raised when the child has ended its task
                    broken = error
                    child.send({"size": -1}, [])
                else:
                    child.send({"size": len(data)}, [data])
            elif kind in ("row", "layout", "cells", "lines"):
                size = message.get("size")
                yield message, None if size is None else child.receive(size, time.monotonic() + _SILENCE_S)
            else:
                finished = True
                if kind == "failed" and broken is not None:
                    raise broken
                if kind == "refused":
                    raise InputError(message["what"], **message["about"])
                if kind == "damaged":
                    raise TableError(Reason(message["reason"]), message["message"])
    except (EOFError, BrokenPipeError):
        code = child.exit_code()
        if code == -signal.SIGPROF:  # its own alarm
            raise TableError(Reason.DECODE_TIMEOUT, f"no row came in {_CPU_S:g} CPU seconds") from None
        end = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise TableError(Reason.DECODER_CRASHED, f"the process that read the file ended by {end}") from None
    except (KeyError, TypeError, ValueError) as error:
        # No answer of ours: `finished` is not set, so whoever speaks there is not asked again.
        raise _no_answer(error) from None
    finally:
        if finished:
            children.give_back(child)
        else:
            child.kill()


@contextmanager
def _an_answer() -> Iterator[None]:
    """What a child says is taken apart in the block; TableError where it is no answer of ours."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _no_answer(error) from None


def _no_answer(error: Exception) -> TableError:
    return TableError(Reason.DECODER_CRASHED, f"the process that read the file gave no answer: {error!r}")


children: Pool[Child] = Pool(lambda memory_mb: Child("pipeline.source.reading.parquet", memory_mb))


@atexit.register
def close_children() -> None:
    """End every idle child; the next file starts a new one."""
    children.close()


# -- in the child --------------------------------------------------------------------------------------------


def _messages(task: dict[str, Any], read: ReadRange) -> Iterator[Message]:
    with RangedFile(read, task["size"], whole=False) as file:
        try:
            if "cells" in task:
                yield from _cells(file, *task["cells"])
                yield {"kind": "end"}, None
                return
            if "lines" in task:
                folder = FolderSource.model_validate_json(task["source"])
                for lines, names in text_file.metadata(file, task["lines"], folder, task["where"]):
                    yield {"kind": "lines", "lines": lines, "fields": names}, None
                yield {"kind": "end"}, None
                return
            source = ParquetSource.model_validate_json(task["source"])
            if task["span"] is None:
                yield {"kind": "layout", "groups": parquet_file.layout(file, source, task["where"])}, None
            else:
                span = task["span"]
                span["ranges"] = tuple(tuple(pair) for pair in span["ranges"])
                for item in parquet_file.rows(file, source, task["where"], Span(**span)):
                    row, uri = item if isinstance(item, tuple) else (item, None)
                    size = None if row.image is None else len(row.image)
                    values = {name: getattr(row, name) for name in _ROW_FIELDS}
                    yield {"kind": "row", "row": values, "uri": uri, "size": size}, row.image
            yield {"kind": "end"}, None
        except InputError as error:
            about = {"key": error.key, "value": error.value, "rule": error.rule, "next_step": error.next_step}
            yield {"kind": "refused", "what": error.what, "about": about}, None
        except TableError as error:
            yield {"kind": "damaged", "reason": error.reason.value, "message": error.message}, None
        except MemoryError:
            yield {"kind": "damaged", "reason": Reason.DECODE_MEMORY.value, "message": "out of memory"}, None
        except OSError:
            yield {"kind": "failed"}, None


def _cells(file: RangedFile, kind: Any, max_rows: int, max_bytes: int) -> Iterator[Message]:
    if kind == "parquet":
        for columns, rows in parquet_file.cells(file, max_rows, max_bytes):
            yield {"kind": "cells", "columns": columns, "rows": rows, "broken": {}}, None
        return
    for texts, rows, broken in text_file.cells(file, kind, max_rows):
        columns = {name: (json.dumps(values), list(range(rows))) for name, values in texts.items()}
        yield {"kind": "cells", "columns": columns, "rows": rows, "broken": broken}, None


def _serve(memory_mb: int) -> None:
    """Answer tasks from standard input until it closes."""
    source, sink = limited_pipes(memory_mb)
    pa.set_memory_pool(pa.system_memory_pool())  # others reserve address space, which is limited here

    def read(start: int, length: int) -> bytes:
        out = bytearray()
        while length > len(out):
            send(sink, {"kind": "read", "start": start + len(out), "length": length - len(out)}, [])
            size = read_header(source)["size"]
            if size < 0:
                raise OSError("the parent could not read these bytes")
            if not size:
                break
            out += read_exactly(source, size)
        return bytes(out)

    while True:
        try:
            task = read_header(source)
            alarms(_CPU_S, 0)
            for message, image in _messages(task, read):
                send(sink, message, [] if image is None else [image])
                alarms(_CPU_S, 0)
            alarms(0, 0)
        except (EOFError, BrokenPipeError):
            return


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
