"""The ledger: commit records of the newest generation, and bundles of all older visible ones.

A bundle is a Parquet file of (name, record) that a claim lists; it replaces thousands of small reads by one.
Bundles are immutable; a claim adds one for the records since the last claim and merges them when many.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.storage import Root
from pipeline.storage_errors import StoreUnavailable
from pipeline.store import layout
from pipeline.store.generation import fenced, latest_number, read_claim
from pipeline.store.record import CommitRecord, parse_record

_MERGE_BUNDLES = 8
_READERS = 16
_SCHEMA = pa.schema([pa.field("name", pa.string(), False), pa.field("record", pa.large_binary(), False)])


def commit(root: Root, record: CommitRecord) -> bool:
    """Make a record visible: True when it landed now, False when the same record had landed before.

    ConflictError when a newer generation fences this one off. Any other exception leaves the outcome unknown;
    committing the same record again is always right, for its name is its content.
    """
    created = root.put_if_absent(record.name, record.to_bytes())
    if latest_number(root) > record.generation:
        raise fenced(root, record.generation)
    return created


def visible_records(root: Root) -> list[tuple[str, CommitRecord]]:
    """(name, record) of every visible commit record, ordered by name: by generation, then by content."""
    number = latest_number(root)
    if not number:
        return []
    bundles = read_claim(root, number)["bundles"]
    # Parsed one by one: the bytes of all records together would take more memory than the records.
    found = {name: parse_record(data, name) for bundle in bundles for name, data in read_bundle(root, bundle)}
    found.update({name: parse_record(data, name) for name, data in _generation_records(root, number).items()})
    return sorted(found.items())


def collect(root: Root, number: int) -> list[str]:
    """Bundle everything visible in generation `number`; returns the names for the next claim."""
    if not number:
        return []
    bundles: list[str] = list(read_claim(root, number)["bundles"])
    fresh = _generation_records(root, number)
    if len(bundles) >= _MERGE_BUNDLES:
        fresh.update({name: data for bundle in bundles for name, data in read_bundle(root, bundle)})
        bundles = []
    if fresh:
        bundles.append(_write_bundle(root, fresh))
    return bundles


def _generation_records(root: Root, number: int) -> dict[str, bytes]:
    names = [info.key for info in root.list(layout.ledger_dir(number)) if info.key.endswith(".json")]
    if not names:
        return {}
    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(names, pool.map(root.read_bytes, names), strict=True))


def _write_bundle(root: Root, records: dict[str, bytes]) -> str:
    names = sorted(records)
    table = pa.table({"name": names, "record": [records[n] for n in names]}, schema=_SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=4096, write_page_checksum=True)
    data = sink.getvalue().to_pybytes()
    name = f"{layout.SNAPSHOTS}/{layout.content_name(data)}.parquet"
    root.put_if_absent(name, data)
    return name


def read_bundle(root: Root, name: str) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every record in a bundle; InputError when the bundle is missing or damaged."""
    try:
        with root.open(name) as file:
            reader = pq.ParquetFile(file, page_checksum_verification=True)
            for batch in reader.iter_batches(batch_size=4096):
                yield from zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True)
    except StoreUnavailable:
        raise
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"The ledger bundle {root.uri_of(name)} cannot be read: {error}",
            rule="bundles are written once and never changed",
            next_step="restore the object from a backup or an older version of it",
        ) from None
