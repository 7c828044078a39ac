"""Request files: Parquet, CSV or JSON Lines bytes to columns of cells, with the columns renamed as configured.

CSV cells are text until the request's own type reads them, so a prompt "007" stays "007"; an empty cell is unset.
A broken line is a row without cells and with a reason, so that all of them are told at once with what else is wrong.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError, InputError
from pipeline.sample.requests import FIELDS

_MAX_ROWS, _MAX_BYTES = 20_000_000, 1 << 30
SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}


def file_format(uri: str, given: str) -> str:
    """parquet, csv or jsonl: as given, or for "auto" by the ending of the name."""
    if given != "auto":
        return given
    for suffix, name in SUFFIXES.items():
        if uri.lower().endswith(suffix):
            return name
    raise ConfigError(
        "The format of the request file cannot be told from its name",
        key="requests.uri",
        value=uri,
        rule=f"auto knows names that end in {', '.join(SUFFIXES)}",
        next_step="set requests.format to parquet, csv or jsonl",
    )


@dataclass(frozen=True)
class Cells:
    """What a request file holds: columns by their own names, of equal length, and by row (from 1) what is broken.

    A broken row has None in every column.
    """

    columns: dict[str, list[Any]]
    broken: dict[int, str] = field(default_factory=dict)


def read_columns(data: bytes, kind: str, origin: str) -> Cells:
    """All rows of a request file; InputError when it cannot be read at all."""
    try:
        if kind == "parquet":
            return _read_parquet(data)
        text = data.decode("utf-8-sig")
        if kind == "csv":
            return _read_csv(text)
        # One object a line: a line that is none breaks its own row alone.
        rows: list[dict[str, Any]] = []
        names: dict[str, None] = {}
        broken: dict[int, str] = {}
        for number, line in enumerate(io.StringIO(text, newline="\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("no JSON object")
            except (ValueError, RecursionError) as error:
                row, broken[len(rows) + 1] = {}, f"line {number}: {error}"
            rows.append(row)
            names.update(dict.fromkeys(row))
        return Cells({name: [row.get(name) for row in rows] for name in names}, broken)
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        raise InputError(
            f"The request file {origin} cannot be read as {kind}: {error}",
            key="requests.uri",
            value=origin,
            rule="Parquet, CSV with a header line, or one JSON object a line; text is UTF-8",
            next_step="correct the file, or set requests.format",
        ) from None


def _read_parquet(data: bytes) -> Cells:
    """Texts that repeat are one text in memory: a file of kilobytes may hold one of megabytes a million times."""
    file = pq.ParquetFile(io.BytesIO(data))
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    size = sum(group.column(leaf).total_uncompressed_size for group in groups for leaf in range(group.num_columns))
    if size > _MAX_BYTES or file.metadata.num_rows > _MAX_ROWS:
        raise ValueError(
            f"{file.metadata.num_rows} rows that unpack to {size} bytes, over {_MAX_ROWS} rows or {_MAX_BYTES} bytes"
        )
    texts = [f.name for f in file.schema_arrow if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    table = pq.read_table(io.BytesIO(data), read_dictionary=texts)
    columns: dict[str, list[Any]] = {}
    for name in table.column_names:
        columns[name] = []
        for chunk in table[name].chunks:
            if pa.types.is_dictionary(chunk.type):
                values = chunk.dictionary.to_pylist()
                columns[name] += [None if index is None else values[index] for index in chunk.indices.to_pylist()]
            else:
                columns[name] += chunk.to_pylist()
    return Cells(columns)


def _read_csv(text: str) -> Cells:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = next((row for row in reader if row), [])
    if len(set(header)) != len(header):
        raise ValueError(f"a column is named twice in {header}")
    rows: list[list[str]] = []
    broken: dict[int, str] = {}
    while True:
        first = reader.line_num + 1
        try:
            values = next(reader)
            if values and len(values) != len(header):
                raise ValueError(f"{len(values)} cells, the header has {len(header)}")
        except StopIteration:
            break
        except (csv.Error, ValueError) as error:
            last = reader.line_num
            broken[len(rows) + 1] = f"{f'lines {first} to {last}' if last > first else f'line {first}'}: {error}"
            values = [""] * len(header)
        if values:
            rows.append(values)
    return Cells({name: [row[i] or None for row in rows] for i, name in enumerate(header)}, broken)


def map_columns(
    columns: Mapping[str, Sequence[Any]], mapping: Mapping[str, str], other: str, origin: str
) -> dict[str, Sequence[Any]]:
    """Rename file columns to request fields; `mapping` is field -> file column, other names stand for themselves.

    What is left over goes by `other`: "refuse" (ConfigError), "keep" (into `extra` as JSON) or "drop".
    """
    unknown = [field for field in mapping if field not in FIELDS]
    missing = [column for column in mapping.values() if column not in columns]
    if unknown or missing:
        raise ConfigError(
            f"The column mapping does not fit {origin}",
            key="requests.columns",
            value=dict(mapping),
            rule=f"fields are {', '.join(FIELDS)}; the file has {', '.join(columns) or 'no column'}",
            next_step=f"correct {', '.join([*unknown, *missing])}",
        )
    mapped_columns = set(mapping.values())
    sources = {name: name for name in FIELDS if name in columns and name not in mapped_columns} | dict(mapping)
    left_over = [name for name in columns if name not in sources.values()]
    if left_over and other == "refuse":
        free = [field for field in FIELDS if field not in sources]
        near = difflib.get_close_matches(left_over[0].lower(), [*free, "class", "text", "caption"], n=1)
        meant = {"class": "label", "text": "prompt", "caption": "prompt"}.get(near[0], near[0]) if near else "prompt"
        raise ConfigError(
            f"The request file {origin} has columns that are no field of a request: {', '.join(left_over)}",
            key="requests.other_columns",
            value=other,
            rule=f"fields are {', '.join(FIELDS)}",
            next_step=f"map them (requests.columns.{meant}={left_over[0]}), "
            "or say requests.other_columns=keep or drop",
        )
    mapped: dict[str, Sequence[Any]] = {field: columns[source] for field, source in sources.items()}
    if left_over and other == "keep":
        # Canonical JSON; what JSON cannot hold becomes its text.
        extra: list[str | None] = []
        for cells in zip(*(columns[name] for name in left_over), strict=True):
            row = {name: cell for name, cell in zip(left_over, cells, strict=True) if cell is not None}
            text = json.dumps(row, sort_keys=True, separators=(",", ":"), default=str)
            extra.append(text if row else None)
        mapped["extra"] = extra
    return mapped
