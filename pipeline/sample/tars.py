"""Images as WebDataset shards: one tar per unit of requests, its name and bytes a function of its rows alone.

Members follow WebDataset's convention, one key per sample: <request id>.png (or .jpg, .webp), .json with the
provenance, .txt with the prompt and .cls with the label where there are any. Times and owners are zero, so equal rows
give an equal tar whoever wrote it, and putting it again changes nothing.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.store.read.external import place_in

SHARDS_DIR = "shards"
_SUFFIXES = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}

PutIfAbsent = Callable[[str, bytes], bool]


def pack_units(rows: pa.Table, put: PutIfAbsent) -> pa.Table:
    """Put the images of `rows` (the schema IMAGES) as one tar per unit; the rows with their places for the bytes."""
    packed = [
        _pack_unit(unit, rows.filter(pc.equal(rows["unit"], unit)).sort_by("row"), put)
        for unit in sorted(set(rows["unit"].to_pylist()))
    ]
    return pa.concat_tables(packed) if packed else rows


def _pack_unit(unit: int, rows: pa.Table, put: PutIfAbsent) -> pa.Table:
    out = io.BytesIO()
    spans: list[tuple[int, int]] = []
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows.select(["key", "image", "media_type", "label", "prompt", "provenance"]).to_pylist():
            _add(tar, f"{row['key']}.{_SUFFIXES[row['media_type']]}", row["image"])
            spans.append((out.tell() - _padded(len(row["image"])), len(row["image"])))
            _add(tar, f"{row['key']}.json", row["provenance"].encode())
            if row["prompt"] is not None:
                _add(tar, f"{row['key']}.txt", row["prompt"].encode())
            if row["label"] is not None:
                _add(tar, f"{row['key']}.cls", str(row["label"]).encode())
    data = out.getvalue()
    key = f"{SHARDS_DIR}/{unit:08d}-{hashlib.sha256(data).hexdigest()[:16]}.tar"
    put(key, data)
    places = [place_in(key, start, length) for start, length in spans]
    at_image, at_file = (rows.schema.get_field_index(name) for name in ("image", "file"))
    rows = rows.set_column(at_image, rows.schema.field(at_image), pa.array([b""] * len(rows), pa.large_binary()))
    return rows.set_column(at_file, rows.schema.field(at_file), pa.array(places, pa.string()))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
