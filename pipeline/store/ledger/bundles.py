"""Bundles of commit records: one Parquet object of many, as columns, in place of thousands of small reads.

A claim lists bundles of older generations' records in `snapshots/`. A *seal* is a bundle beside the records of one
generation, in its own ledger directory; it repeats records that lie there and nothing else, so that what is visible
does not depend on whether, when, how often or by whom a generation was sealed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.storage.errors import RESTORE
from pipeline.storage.root import Root
from pipeline.store.ledger import layout
from pipeline.store.ledger.record import RECORDS, CommitRecord, Records, parse_record
from pipeline.store.read.row_groups import reading_table

# Fewer loose records than this are read in about the time that one more object would cost.
SEAL_AT_LEAST = 64
_READERS = 16
_PER_GROUP = 1 << 16
_RECORD, _BUNDLE = ".json", ".parquet"
_LATER = "group_held"  # bundles of earlier releases have no such column
# Earlier releases wrote, and read, the bytes of each record. To them this says that they are too old.
_NEWER = layout.canonical_json(
    {"version": 2, "generation": 0, "covered": [], "files": [], "reject_file": None}
    | {"rejects": {}, "filtered": {}, "unit_rows": []}
)

Kept = dict[str, Records]


def generation_records(root: Root, number: int, kept: Kept | None = None) -> Records:
    """Every record in the ledger of a generation, each once. kept: bundles read before, to which it adds."""
    seals, loose = _ledger(root, number)
    sealed = Records.union([read_bundle(root, seal, kept) for seal in seals])
    return Records.union([sealed, Records.of(_read(root, _not_in(sealed, loose)))])


def seal(root: Root, number: int, at_least: int = SEAL_AT_LEAST) -> str | None:
    """Bundle the records of a generation that no seal holds yet; None when they are fewer than `at_least`.

    Anybody may call it at any time, for any generation. Raises what the store raises.
    """
    seals, loose = _ledger(root, number)
    for key in seals:
        with reading_table(root.uri_of(key), _remedy(key)), root.open(key) as file:
            names = pq.ParquetFile(file, page_checksum_verification=True).read(["name"])["name"]
        loose = sorted(set(loose).difference(names.to_pylist()))
    if len(loose) < max(1, at_least):
        return None
    # A damaged record stays alone: whoever opens the dataset is to hear of it.
    return write_bundle(root, layout.ledger_dir(number), Records.of(_read(root, loose, sound_only=True)))


def write_bundle(root: Root, directory: str, records: Records, generation: int | None = None) -> str:
    """Put records as one bundle named by its content; returns its key.

    generation: of the claim that is to name it, where garbage collection may remove it one day.
    """
    sink = pa.BufferOutputStream()
    older = pa.array([_NEWER], pa.large_binary()).dictionary_encode().take(pa.array([0] * len(records), pa.int32()))
    table = records.table.append_column(pa.field("record", older.type, False), older)
    blobs = ["record", "set_reason", "group_bucket"]
    pq.write_table(
        table,
        sink,
        _PER_GROUP,
        compression="zstd",
        use_dictionary=blobs,
        write_statistics=False,
        write_page_checksum=True,
    )
    body = sink.getvalue().to_pybytes()
    key = f"{directory}/{layout.content_name(body)}{_BUNDLE}"
    if generation is not None:
        key = layout.removable(directory, body, generation)
    root.put_if_absent(key, body)
    return key


def read_bundle(root: Root, name: str, kept: Kept | None = None) -> Records:
    """The records in a bundle; InputError when it is missing or damaged. kept: as `generation_records`."""
    if kept is not None and name in kept:
        return kept[name]
    with reading_table(root.uri_of(name), _remedy(name)), root.open(name) as file:
        reader = pq.ParquetFile(file, page_checksum_verification=True)
        stored = [name for name in RECORDS.names if name in reader.schema_arrow.names]
        if set(RECORDS.names) - set(stored) <= {_LATER}:
            table = reader.read(stored, use_threads=True)
            if _LATER not in stored:
                nothing = pa.array([[]] * len(table), RECORDS.field(_LATER).type)
                table = table.append_column(RECORDS.field(_LATER), nothing)
            records = Records(table)
        else:
            table = reader.read(["name", "record"])
            pairs = zip(table["name"].to_pylist(), table["record"].to_pylist(), strict=True)
            records = Records.of((key, parse_record(data, key)) for key, data in pairs)
    if kept is not None:
        kept[name] = records
    return records


def _remedy(name: str) -> str:
    spare = name.startswith(f"{layout.LEDGER}/")
    return "delete this one object: it only repeats the records that lie beside it" if spare else RESTORE


def _not_in(records: Records, names: Sequence[str]) -> list[str]:
    """Those of some names that none of the records has."""
    found = pc.is_in(pa.array(names, pa.string()), records.table["name"].combine_chunks())
    return [name for name, there in zip(names, found.to_pylist(), strict=True) if not there]


def _ledger(root: Root, number: int) -> tuple[list[str], list[str]]:
    """(seals, records) in the ledger of a generation; a record that a listed seal holds may be missing here."""
    keys = [info.key for info in root.list(layout.ledger_dir(number))]
    return [k for k in keys if k.endswith(_BUNDLE)], [k for k in keys if k.endswith(_RECORD)]


def _read(root: Root, names: Sequence[str], sound_only: bool = False) -> list[tuple[str, CommitRecord]]:
    """Loose records; those alone that are what their name says, where they are to be sound."""

    def read(name: str) -> tuple[str, CommitRecord] | None:
        data = root.read_bytes(name)
        try:
            record = parse_record(data, name)
        except InputError:
            if sound_only:
                return None
            raise
        return (name, record) if not sound_only or layout.hash_in(name) == layout.content_name(data) else None

    if not names:
        return []
    with ThreadPoolExecutor(_READERS) as pool:
        return [found for found in pool.map(read, names) if found is not None]
