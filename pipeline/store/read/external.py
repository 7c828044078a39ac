"""Blobs that rows keep outside their Parquet file: whole objects, or ranges of one, with the hash of their bytes.

A row that does names the place in `file`, "key" or "key#offset+length" relative to the root, and the sha256 of the
bytes in `content_sha256`; its own blob is empty. Rows become visible after what they name was put, so a visible row
always has its bytes. Garbage collection knows data/ and rejects/ only and leaves such objects alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import pyarrow as pa

from pipeline.storage.errors import storage_errors
from pipeline.storage.root import Root

COLUMNS = ("file", "content_sha256")
_RANGE = re.compile(r"^(?P<key>.+)#(?P<start>\d+)\+(?P<length>\d+)$")


def place_in(key: str, start: int, length: int) -> str:
    """The name of a range of an object."""
    return f"{key}#{start}+{length}"


def read_outside(root: Root, place: str) -> bytes:
    """The bytes that a row names; FileNotFoundError when they are gone."""
    found = _RANGE.match(place)
    if found is None:
        return root.read_bytes(place)
    return root.read_range(found["key"], int(found["start"]), int(found["length"]))


def problems_outside(root: Root, rows: pa.Table, *, read: bool) -> Iterator[tuple[str, str, str]]:
    """(kind, where, detail) of every named blob that is missing, short, or with `read` not of its hash.

    rows: a table with COLUMNS.
    """
    sizes: dict[str, int | None] = {}
    for place, digest in zip(*(rows[name].to_pylist() for name in COLUMNS), strict=True):
        if place is None:
            continue
        found = _RANGE.match(place)
        key, end = (place, 0) if found is None else (found["key"], int(found["start"]) + int(found["length"]))
        if key not in sizes:
            sizes[key] = root.info(key).size_bytes if root.exists(key) else None
        size = sizes[key]
        if size is None:
            yield "missing", place, "a row names this object and it is not there"
        elif size < end or size == 0:
            yield "size", place, f"{size:,} bytes there, the row's bytes end at {end:,}"
        elif read:
            try:
                data = read_outside(root, place)
            except storage_errors() as error:
                yield "unreadable", place, f"{type(error).__name__}: {error}"
                continue
            if hashlib.sha256(data).digest() != digest:
                yield "checksum", place, "its bytes are not those that were committed"
