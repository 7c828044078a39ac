"""The ledger: commit records of the newest generation, and bundles of all older visible ones.

A bundle is a Parquet file of (name, record) that a claim lists; it replaces thousands of small reads by one.
Bundles are immutable; a claim adds one for the records since the last claim and merges them when many. Until that
claim comes, the records of the newest generation are read from its seals (see `bundles`), and singly after those.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipeline.errors import PipelineError
from pipeline.storage.root import Root
from pipeline.store.ledger import layout
from pipeline.store.ledger.bundles import Named, generation_records, read_bundle, write_bundle
from pipeline.store.ledger.generation import (
    PATIENCE_S,
    Generation,
    at_one_generation,
    check_newest,
    claim_next,
    read_claim,
)
from pipeline.store.ledger.record import CommitRecord, parse_record

_MERGE_BUNDLES = 8


def commit(root: Root, record: CommitRecord) -> bool:
    """Make a record visible: True when it landed now, False when the same record had landed before.

    ConflictError when a newer generation fences this one off, or is about to: the outcome is unknown then, too. Any
    other exception leaves it unknown; committing the same record again is always right, for its name is its content.
    """
    created = root.put_if_absent(record.name, record.to_bytes())
    check_newest(root, record.generation)
    return created


def visible_records(root: Root, number: int | None = None) -> list[tuple[str, CommitRecord]]:
    """(name, record) of every commit record visible in generation `number`, by default the newest.

    Ordered by name: by generation, then by content.
    """
    if number is None:
        return at_one_generation(root, lambda newest: visible_records(root, newest))
    return parsed(visible_named(root, number))


def visible_named(root: Root, number: int) -> Iterator[Named]:
    """(name, bytes) of every commit record visible in generation `number`, few in memory at a time."""
    if number:
        for bundle in read_claim(root, number)["bundles"]:
            yield from read_bundle(root, bundle)
        yield from generation_records(root, number)


def parsed(named: Iterable[Named]) -> list[tuple[str, CommitRecord]]:
    """(name, record) of records as they are stored, ordered by name, each once."""
    # Records have no cycles, and Python's search for some would take a quarter of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        # One by one: the bytes of all records together would take more memory than the records.
        records = {name: parse_record(data, name) for name, data in named}
    finally:
        if collecting:
            gc.enable()
    return sorted(records.items())


def collect(root: Root, number: int) -> list[str]:
    """Bundle everything visible in generation `number`; returns the names for the next claim."""
    if not number:
        return []
    bundles: list[str] = list(read_claim(root, number)["bundles"])
    fresh = dict(generation_records(root, number))
    if len(bundles) >= _MERGE_BUNDLES:
        fresh.update({name: data for bundle in bundles for name, data in read_bundle(root, bundle)})
        bundles = []
    if fresh:
        bundles.append(write_bundle(root, layout.SNAPSHOTS, sorted(fresh.items()), number + 1))
    return bundles


@contextmanager
def claimed(
    root: Root,
    job: str,
    *,
    note: Callable[[], Mapping[str, Any]] = dict,
    after: int = 0,
    patience_s: float = PATIENCE_S,
) -> Iterator[Generation]:
    """The next generation of a root, which the block holds; raises what `claim_next` raises.

    Closed with its `summary` when the block ends, with the kind of a PipelineError that ends it. Anything else leaves
    it open, as a crash does, for the next run to find.
    """
    generation = claim_next(
        root,
        lambda previous: collect(root, previous),
        job=job,
        note=note,
        after=after,
        patience_s=patience_s,
    )
    try:
        yield generation
        generation.close()
    except PipelineError as error:
        generation.close({"status": type(error).__name__}, sealed=False)
        raise
    finally:
        generation.abandon()
