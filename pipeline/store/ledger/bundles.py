"""Bundles of commit records: one Parquet object of (name, record) in place of thousands of small reads.

A claim lists bundles of older generations' records in `snapshots/`. A *seal* is a bundle beside the records of one
generation, in its own ledger directory; it repeats records that lie there, byte for byte, and nothing else, so that
what is visible does not depend on whether, when, how often or by whom a generation was sealed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.errors import RESTORE
from pipeline.storage.root import Root
from pipeline.store.ledger import layout
from pipeline.store.read.row_groups import reading_table

# Fewer loose records than this are read in about the time that one more object would cost.
SEAL_AT_LEAST = 64
_READERS = 16
_PER_GROUP = 4096
_RECORD, _BUNDLE = ".json", ".parquet"
_SCHEMA = pa.schema([pa.field("name", pa.string(), False), pa.field("record", pa.large_binary(), False)])

Named = tuple[str, bytes]


def generation_records(root: Root, number: int) -> Iterator[Named]:
    """(name, bytes) of every record in the ledger of a generation, each once, few in memory at a time."""
    seals, loose = _ledger(root, number)
    seen: set[str] = set()
    for seal in seals:
        for name, data in read_bundle(root, seal):
            if name not in seen:
                seen.add(name)
                yield name, data
    yield from _read(root, [name for name in loose if name not in seen])


def seal(root: Root, number: int, at_least: int = SEAL_AT_LEAST) -> str | None:
    """Bundle the records of a generation that no seal holds yet; None when they are fewer than `at_least`.

    Anybody may call it at any time, for any generation. Raises what the store raises.
    """
    seals, loose = _ledger(root, number)
    sealed: set[str] = set()
    for key in seals:
        for batch in _batches(root, key, ["name"]):
            sealed.update(batch.column(0).to_pylist())
    loose = [name for name in loose if name not in sealed]
    if len(loose) < max(1, at_least):
        return None
    # A damaged record stays alone: whoever opens the dataset is to hear of it.
    sound = (
        (name, data)
        for name, data in _read(root, loose)
        if name.rpartition("/")[2] == layout.content_name(data) + _RECORD
    )
    return write_bundle(root, layout.ledger_dir(number), sound)


def write_bundle(root: Root, directory: str, records: Iterable[Named], generation: int | None = None) -> str:
    """Put records as one bundle named by its content; returns its key. In one order they are one object.

    generation: of the claim that is to name it, where garbage collection may remove it one day.
    """
    sink, rest = pa.BufferOutputStream(), iter(records)
    with pq.ParquetWriter(sink, _SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        while group := list(islice(rest, _PER_GROUP)):
            names, data = zip(*group, strict=True)
            table = pa.table({"name": names, "record": data}, schema=_SCHEMA)
            writer.write_table(table, row_group_size=_PER_GROUP)
    body = sink.getvalue().to_pybytes()
    key = f"{directory}/{layout.content_name(body)}{_BUNDLE}"
    if generation is not None:
        key = layout.removable(directory, body, generation)
    root.put_if_absent(key, body)
    return key


def read_bundle(root: Root, name: str) -> Iterator[Named]:
    """(name, bytes) of every record in a bundle; InputError when the bundle is missing or damaged."""
    for batch in _batches(root, name, ["name", "record"]):
        yield from zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True)


def _batches(root: Root, name: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    schema = pa.schema([_SCHEMA.field(column) for column in columns])
    spare = name.startswith(f"{layout.LEDGER}/")
    remedy = "delete this one object: it only repeats the records that lie beside it" if spare else RESTORE
    with reading_table(root.uri_of(name), remedy), root.open(name) as file:
        reader = pq.ParquetFile(file, page_checksum_verification=True)
        for batch in reader.iter_batches(batch_size=_PER_GROUP, columns=columns):
            yield batch.cast(schema)


def _ledger(root: Root, number: int) -> tuple[list[str], list[str]]:
    """(seals, records) in the ledger of a generation; a record that a listed seal holds may be missing here."""
    keys = [info.key for info in root.list(layout.ledger_dir(number))]
    return [k for k in keys if k.endswith(_BUNDLE)], [k for k in keys if k.endswith(_RECORD)]


def _read(root: Root, names: Sequence[str]) -> Iterator[Named]:
    if not names:
        return
    with ThreadPoolExecutor(_READERS) as pool:
        for first in range(0, len(names), _PER_GROUP):
            part = names[first : first + _PER_GROUP]
            yield from zip(part, pool.map(root.read_bytes, part), strict=True)
