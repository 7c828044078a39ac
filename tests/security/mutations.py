"""Ways in which a stored file can be wrong: cut, emptied, exchanged, or one field of it made into something else."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_VALUES: tuple[Any, ...] = (None, [], {}, "../text", float("nan"), 10**30, -1)
_MISSING = object()
_DEPTH = 3
_PER_LEVEL = 24


def mutations(path: Path, data: bytes) -> Iterator[tuple[str, bytes | None]]:
    """(what was done, the bytes that lie there then; None where the file is gone)."""
    yield "gone", None
    yield "empty", b""
    yield "cut", data[: len(data) // 2]
    yield "without its end", data[:-1] if not data.endswith(b"\n") else data[:-3]
    yield "no UTF-8", b"\xff\xfe\x00\xd8"
    yield "another file", b"\x89PNG\r\n\x1a\n" + b"\0" * 64
    if path.suffix == ".parquet":
        yield from _of_parquet(data)
        return
    for text in (b"null", b"[]", b"{}", b'"text"', b"1e999", b"[1, 2]", b"[" * 100_000, b"1" * 5000):
        yield f"the document {text[:20]!r}", text
    if path.suffix == ".json":
        yield from _of_json(json.loads(data), "")
    elif path.suffix == ".jsonl":
        lines = data.splitlines(keepends=True)
        for at in {0, len(lines) - 1}:
            for what, line in _of_json(json.loads(lines[at]), f"line {at} "):
                yield what, b"".join([*lines[:at], line + b"\n", *lines[at + 1 :]])
        yield "a line of text", b"".join([lines[0], b"text\n", *lines[1:]])


def _of_json(document: Any, where: str) -> Iterator[tuple[str, bytes]]:
    for place in _places(document, ()):
        for value in (_MISSING, *_VALUES):
            changed = copy.deepcopy(document)
            holder = changed
            for step in place[:-1]:
                holder = holder[step]
            if value is _MISSING:
                del holder[place[-1]]
            else:
                holder[place[-1]] = value
            shown = "missing" if value is _MISSING else f"{value!r}"
            yield f"{where}{'.'.join(map(str, place))}: {shown}", json.dumps(changed).encode()


def _places(document: Any, place: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if len(place) >= _DEPTH:
        return
    if isinstance(document, dict):
        steps: list[Any] = list(document)[:_PER_LEVEL]
    else:
        steps = [0] if isinstance(document, list) and document else []
    for step in steps:
        yield (*place, step)
        yield from _places(document[step], (*place, step))


def _of_parquet(data: bytes) -> Iterator[tuple[str, bytes]]:
    for at in (len(data) // 3, len(data) // 2, len(data) - 20):
        yield f"byte {at} changed", data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
    yield "other columns", _parquet(pa.table({"other": [1, 2]}))
    yield "no rows", _parquet(pq.read_table(io.BytesIO(data)).slice(0, 0))
    table = pq.read_table(io.BytesIO(data))
    for at, field in enumerate(table.schema):
        yield f"without the column {field.name}", _parquet(table.remove_column(at))
        texts = pa.array(["text"] * len(table))
        yield f"texts in the column {field.name}", _parquet(table.set_column(at, field.name, texts))


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()
