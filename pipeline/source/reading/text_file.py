"""CSV and JSON Lines files, for the child that reads tables (`parquet`): metadata of folders, rows of any columns.

    metadata    lines as (number, file name, canonical JSON of caption, label and extra fields, what is wrong)
    cells       rows as `parquet_file.cells` gives those of a table, and what is wrong with which

One line is held at a time, and of one that is longer than it may be only its beginning.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any, Literal

from pipeline.errors import InputError
from pipeline.source.config import FolderSource
from pipeline.source.reading.filters import Cell, filter_columns, keeps
from pipeline.source.reading.parquet_file import TableError
from pipeline.source.reading.rows import (
    MAX_TEXT_BYTES,
    canonical,
    parse_caption,
    parse_label,
    parse_object,
    pick_extra,
)
from pipeline.source.reasons import Reason
from pipeline.storage.stores import RangedFile

Kind = Literal["csv", "jsonl"]
# A line's number, its file name (of whatever type it is), canonical JSON, and what is wrong with it.
Metadata = tuple[int, Any, str, str | None]

FILTERED = "filtered"  # a key of an entry's metadata: the filter does not keep the row
csv.field_size_limit(MAX_TEXT_BYTES)  # of a cell, as of any text; the library's own limit is an eighth of it
_MAX_LINE_BYTES = 16 << 20  # what may be made of a longer one, some twenty times its size, is not tried
_BUFFER_BYTES = 4 << 20
_BATCH_ROWS = 1000


def meta_of(source: FolderSource, record: Mapping[str, Any]) -> str:
    """Canonical JSON of what a folder keeps of a record, with the filter's mark; ValueError as in `picked`."""
    mark = {} if source.filter is None or keeps(source.filter, record) else {FILTERED: True}
    return canonical({**picked(source, record), **mark})


def picked(source: FolderSource, record: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder keeps of a record: caption, label and extra fields; ValueError where one is of the wrong type."""
    label = source.label if source.label_from == "metadata" else None
    return {
        "caption": parse_caption(record.get(source.caption)) if source.caption else None,
        "label": parse_label(record.get(label), source.classes) if label else None,
        "extra": pick_extra(record, source.extra, source.caption, ("file_name", source.label)),
    }


def metadata(
    file: RangedFile, kind: Kind, source: FolderSource, where: str
) -> Iterator[tuple[list[Metadata], list[str]]]:
    """Lines of a metadata file, many at a time, with the names of fields that none before had; InputError."""
    known: set[str] = set()
    lines: list[Metadata] = []
    new: list[str] = []
    size = 0
    for number, record, problem in (_json_lines if kind == "jsonl" else _csv_lines)(file, source, where):
        meta = ""
        if problem is None:
            try:
                meta = meta_of(source, record)
            except ValueError as error:
                problem = str(error)
            new += record.keys() - known
            known |= record.keys()
        name = record.get("file_name")
        lines.append((number, name, meta, problem))
        size += len(meta) + (len(name) if isinstance(name, str) else 0)
        if len(lines) == _BATCH_ROWS or size > _BUFFER_BYTES:
            yield lines, new
            lines, new, size = [], [], 0
    yield lines, new


def _json_lines(
    file: RangedFile, source: FolderSource, where: str
) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    """(line, record, what is wrong) of each; where a line is broken, what can be read of it."""
    for number, line, size in _lines(file, _MAX_LINE_BYTES):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        record: dict[str, Any] = {}
        try:
            if size > _MAX_LINE_BYTES:
                raise ValueError(f"the line has {size:,} bytes, at most {_MAX_LINE_BYTES:,}")
            record = parse_object(line.decode("utf-8", "surrogateescape"))
            line.decode()
            yield number, record, None
        except ValueError as error:
            yield number, record, "the text is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _csv_lines(
    file: RangedFile, source: FolderSource, where: str
) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    # Divided by what gives the first line a cell file_name; by commas where nothing does.
    first = next(_text(file, "surrogateescape"), "")[: MAX_TEXT_BYTES // 2]
    named = (d for d in ",;\t|" if "file_name" in next(csv.reader(first.splitlines()[:1], delimiter=d), []))
    file.seek(0)
    reader = csv.reader(_text(file, "surrogateescape"), delimiter=next(named, ","), strict=True)
    try:
        names = next(reader, [])
        needed = filter_columns(source.filter) if source.filter else set()
        wrong = [f"there is no column {name}, which source.filter names" for name in needed - set(names)]
        wrong += [f"there are two columns {name!r}" for name in names if names.count(name) > 1]
        if "file_name" not in names:
            wrong.append(f"there is no column file_name; there are {', '.join(names)[:300]}")
    except csv.Error as error:
        wrong = [str(error)]
    if wrong:
        raise InputError(
            f"{where}, line 1: {wrong[0]}",
            key="uri",
            rule="the first line names the columns, each once, file_name among them",
            next_step="correct the first line",
        )
    while True:
        record: dict[str, Any] = {}
        try:
            row = next(reader, None)
            if row is None:
                return
            if not row:
                continue
            record = {name: Cell(value) for name, value in zip(names, row, strict=False)}
            if len(row) != len(names):
                raise ValueError(f"{len(names)} cells are needed, as in the header, and there are {len(row)}")
            "\n".join(row).encode()
            yield reader.line_num, record, None
        except (ValueError, csv.Error) as error:
            # Where a line ends that the library gives up, and the next begins, is not known.
            yield reader.line_num, record, "the text is not UTF-8" if isinstance(error, UnicodeError) else str(error)


def cells(file: RangedFile, kind: Kind, max_rows: int) -> Iterator[tuple[dict[str, list[Any]], int, dict[int, str]]]:
    """(columns, how many rows, what is wrong by the row's place among these) of many rows at a time.

    A column that a row lacks is None in it, and all are where it is wrong. TableError for a file that is none, or has
    more rows than it may.
    """
    rows: list[dict[str, Any]] = []
    broken: dict[int, str] = {}
    try:
        for number, (row, problem) in enumerate((_json_rows if kind == "jsonl" else _csv_rows)(file)):
            if number == max_rows:
                raise TableError(Reason.CORRUPT_CONTAINER, f"more than {max_rows:,} rows")
            if problem is not None:
                broken[len(rows)] = problem
            rows.append(row)
            if len(rows) == _BATCH_ROWS:
                yield _columns(rows), len(rows), broken
                rows, broken = [], {}
        yield _columns(rows), len(rows), broken
    except (ValueError, csv.Error) as error:
        raise TableError(Reason.CORRUPT_CONTAINER, str(error)) from None


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _json_rows(file: RangedFile) -> Iterator[tuple[dict[str, Any], str | None]]:
    """One object a line: a line that is none breaks its own row alone."""
    for number, line, size in _lines(file, MAX_TEXT_BYTES):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        try:
            if size > MAX_TEXT_BYTES:
                raise ValueError(f"{size:,} bytes, at most {MAX_TEXT_BYTES:,}")
            row = json.loads(line.decode())
            if not isinstance(row, dict):
                raise ValueError("no JSON object")
            yield row, None
        except (ValueError, RecursionError) as error:
            yield {}, f"line {number}: {error}"


def _csv_rows(file: RangedFile) -> Iterator[tuple[dict[str, Any], str | None]]:
    """The first line that is not empty names the columns; an empty cell is None."""
    reader = csv.reader(_text(file, "strict"), strict=True)
    header = next((row for row in reader if row), [])
    if len(set(header)) != len(header):
        raise ValueError(f"a column is named twice in {header}")
    while True:
        first = reader.line_num + 1
        try:
            values = next(reader)
            if values and len(values) != len(header):
                raise ValueError(f"{len(values)} cells, the header has {len(header)}")
        except StopIteration:
            break
        except UnicodeDecodeError:
            raise
        except (csv.Error, ValueError) as error:
            last = reader.line_num
            yield dict.fromkeys(header), f"{f'lines {first} to {last}' if last > first else f'line {first}'}: {error}"
            continue
        if values:
            yield {name: value or None for name, value in zip(header, values, strict=True)}, None


def _lines(file: RangedFile, most: int) -> Iterator[tuple[int, bytes, int]]:
    """Number, bytes and size of each line; of one that is longer than `most`, its first bytes only."""
    buffered = io.BufferedReader(file, _BUFFER_BYTES)
    try:
        for number in count(1):
            line = part = buffered.readline(most + 1)
            if not line:
                return
            size = len(line)
            while part and not part.endswith(b"\n"):
                part = buffered.readline(_BUFFER_BYTES)
                size += len(part)
            yield number, line, size
    finally:
        buffered.detach()  # else it closes the file


def _text(file: RangedFile, errors: str) -> Iterator[str]:
    """Lines of UTF-8, ends included. One that is too long becomes one that no reader of CSV takes."""
    text = io.TextIOWrapper(io.BufferedReader(file, _BUFFER_BYTES), "utf-8-sig", errors, newline="")
    try:
        while line := text.readline(_MAX_LINE_BYTES):
            if len(line) == _MAX_LINE_BYTES and line[-1] not in "\r\n":
                while (rest := text.readline(_BUFFER_BYTES)) and rest[-1] not in "\r\n":
                    pass
                line += "x" * (MAX_TEXT_BYTES + 1) + "\n"
            yield line
    finally:
        text.detach().detach()  # else they close the file
