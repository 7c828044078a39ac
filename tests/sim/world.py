"""A source, a dataset and the processes that touch them, each made of the product's own functions.

What a job does on Ray is done here in a row: the same claims, plans, reads, commits and notes, in the same order.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

from pipeline.encode.plan import update_plan
from pipeline.source.config import FolderSource
from pipeline.source.reading.listing import list_entries, read_unit
from pipeline.source.reading.rows import Entry, SourceRow
from pipeline.storage.root import Root
from pipeline.storage.stores import RangedFile
from pipeline.store.ledger.generation import Generation
from pipeline.store.ledger.identity import Identity, claim_identity
from pipeline.store.ledger.ledger import claimed
from pipeline.store.ledger.state import read_state
from pipeline.store.maintain.dedup import is_due, marked, released
from pipeline.store.plan import Plan, read_entries, work_of
from pipeline.store.read.dataset import Dataset, LatentDataset
from pipeline.store.schema import LATENTS, REJECTS, pack_latents
from pipeline.store.writer import Committer
from tests.sim.scheduler import Sim
from tests.sim.storage import Store, Stored, activate, read_if_match
from tests.support.maintain import collect_garbage, compact, deduplicate

DATA, SOURCE = "sim://data", "sim://images"
SHAPE = (1, 2, 2)
IDENTITY = Identity(
    "latents",
    {"latent_dtype": "float16", "posterior": "mode", "codec": {"class": "Toy", "weights_sha256": "00"}},
    {"codec": {"class_name": "Toy", "latent_channels": 1, "factor": 8}},
)
DAMAGED = b"damaged"
_CLOCKS = ("pipeline.storage.root", "pipeline.store.ledger.generation", "pipeline.store.maintain.verify")


class _Serial:
    """A ThreadPoolExecutor that does each call when it is asked for: a process has one thread here."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> _Serial:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def map(self, function: Callable[..., Any], *items: Any) -> Iterator[Any]:
        return map(function, *items)


@dataclass
class Seen:
    """What a reader had before it: the tick before opening and after, and the dataset, or what opening raised."""

    name: str
    began: int
    opened: int
    rows: list[dict[str, Any]]
    dataset: LatentDataset


@dataclass(frozen=True)
class Saved:
    """A world at rest."""

    objects: dict[str, Stored]
    created: list[tuple[int, str, str]]
    acknowledged: list[tuple[int, str]]
    contents: dict[str, bytes]
    tick: int
    now: float
    names: int


@dataclass
class World:
    """The store, the clock and what the processes have told."""

    sim: Sim
    store: Store
    root: Root = field(default_factory=lambda: Root(DATA))
    source: FolderSource = field(
        default_factory=lambda: FolderSource(uri=SOURCE, read_ahead=1, caption=None, label=None)
    )
    acknowledged: list[tuple[int, str]] = field(default_factory=list)  # (tick, record's key)
    seen: list[Seen] = field(default_factory=list)
    contents: dict[str, bytes] = field(default_factory=dict)  # etag -> the bytes it was of

    names: Iterator[int] = field(default_factory=itertools.count)  # of random names

    def save(self) -> Saved:
        """What there is now; whoever is still at work is not part of it."""
        store, sim = self.store, self.sim
        told = (dict(store.objects), list(store.created), list(self.acknowledged), dict(self.contents))
        return Saved(*told, sim.tick, sim.now, next(self.names))

    def restore(self, saved: Saved) -> None:
        """Begin with what another world has come to."""
        self.store.objects, self.store.created = dict(saved.objects), list(saved.created)
        self.acknowledged, self.contents = list(saved.acknowledged), dict(saved.contents)
        self.sim.tick, self.sim.now = saved.tick, saved.now
        self.names = itertools.count(saved.names + 1)

    # -- the source ------------------------------------------------------------------------------------------

    def put_source(self, key: str, data: bytes) -> None:
        """Somebody else writes an image."""
        self.contents[hashlib.md5(data, usedforsecurity=False).hexdigest()] = data
        self.store.put(f"images/{key}", data)

    def change_source(self, changes: list[tuple[str, bytes | None]]) -> None:
        """A process of somebody else: images come, change and go."""
        for key, data in changes:
            self.sim.point("source", key)
            if data is not None:
                self.put_source(key, data)
            elif f"images/{key}" in self.store.objects:
                self.store.delete(f"images/{key}")

    # -- the jobs --------------------------------------------------------------------------------------------

    def encode(
        self, *, drop: bool = False, rows_per_commit: int = 2, retry: tuple[str, ...] = (), exact: bool = False
    ) -> str:
        """The encode job: claim, list, plan, read and commit the gaps, close."""
        claim_identity(self.root, IDENTITY)
        with claimed(self.root, "encode", patience_s=0.0) as generation:
            update_plan(
                self.root,
                list_entries(self.source),
                source={"kind": "folder", "uri": SOURCE},
                generation=generation.number,
                unit_rows=2,
                unit_bytes=1 << 20,
                drop_removed=drop,
            )
            state = read_state(self.root)
            again = state.retryable(retry) | released(self.root, state)
            if not state.gaps(again) and not (exact and is_due(self.root, state)):
                generation.summary = {"status": "unchanged", **(marked(state) if exact else {})}
                return "unchanged"
            self._fill(generation, rows_per_commit)
            if exact:
                generation.close({"status": "encoded"})
                self.dedup()
            return "done"

    def _fill(self, generation: Generation, rows_per_commit: int) -> None:
        state = read_state(self.root)
        again = released(self.root, state)
        committer = Committer(self.root, generation.number, 1 << 20, "float16", {})
        for works in work_of(state.gaps(again), 1 << 16):
            for work in works:
                planned = read_entries(self.root, state.plan.locate(work.unit))
                entries = [
                    Entry(e.key, e.size_bytes, e.etag, e.mtime_ns, e.row_start, e.row_stop, e.meta) for e in planned
                ]
                rows = [r for r in read_unit(self.source, entries, work.ranges) if isinstance(r, SourceRow)]
                for start in range(0, len(rows), rows_per_commit):
                    self._commit(committer, work.unit, rows[start : start + rows_per_commit])

    def _commit(self, committer: Committer, unit: int, rows: list[SourceRow]) -> None:
        stored = [latent_row(unit, r.row, r.key, r.image) for r in rows if r.image not in (None, DAMAGED)]
        rejected = [
            {
                "unit": unit,
                "row": r.row,
                "uri": f"{SOURCE}/{r.key}",
                "key": r.key,
                "outcome": "rejected",
                "reason": "corrupt" if r.image is not None else str(r.reason),
                "message": None,
            }
            for r in rows
            if r.image in (None, DAMAGED)
        ]
        record = committer.commit(
            pa.Table.from_pylist(stored, schema=LATENTS), pa.Table.from_pylist(rejected, schema=REJECTS), {}
        )
        if record is not None:
            self.acknowledged.append((self.sim.tick, record.name))

    def dedup(self) -> None:
        """The deduplication of an encode job."""
        deduplicate(DATA, source_uri=SOURCE, memory_bytes=1 << 20)

    def compact(self) -> None:
        """The compact job, with shards of some rows."""
        compact(DATA, shard_bytes=1200, row_group_bytes=1 << 20)

    def gc(self, grace_s: float = 0.0) -> tuple[int, int]:
        """Garbage collection."""
        return collect_garbage(DATA, grace_s)

    def read(self, name: str = "reader") -> Seen:
        """A reader: opens the dataset, then reads all of it."""
        began = self.sim.tick
        dataset = LatentDataset.open(DATA)
        opened = self.sim.tick
        columns = ["unit", "row", "key", "content_sha256"]
        rows = [r for g in dataset.row_groups for r in dataset.read(g.index, columns).to_pylist()]
        self.seen.append(Seen(name, began, opened, rows, dataset))
        return self.seen[-1]


def _whole(root: Root, key: str, size_bytes: int) -> RangedFile:
    """A file that is read at once: Arrow asks for ranges from threads of its own, which all processes here share."""
    data = root.read_bytes(key)
    return RangedFile(lambda start, length: data[start : start + length], size_bytes)


def latent_row(unit: int, row: int, key: str, image: bytes | None) -> dict[str, Any]:
    """A stored row whose latent is a function of the image's bytes."""
    assert image is not None
    digest = hashlib.sha256(image).digest()
    values = np.frombuffer(digest[:4], np.uint8).astype(np.float32).reshape(1, *SHAPE)
    return {
        "sample_id": hashlib.blake2b(key.encode(), digest_size=16).digest(),
        "key": key,
        "unit": unit,
        "row": row,
        "variant": 0,
        "bucket": "16x16",
        "latent": pack_latents(values, "float16")[0],
        "latent_shape": list(SHAPE),
        **dict.fromkeys(("original_height", "original_width", "crop_height", "crop_width"), 16),
        **dict.fromkeys(("crop_top", "crop_left"), 0),
        "flipped": False,
        "content_sha256": digest,
    }


@contextmanager
def world() -> Iterator[World]:
    """A fresh world in which the product's clocks, threads and random names are the simulator's."""
    sim = Sim()
    store = Store(sim)
    made = World(sim, store)
    clock = mock.Mock(sleep=sim.sleep, time=sim.time, monotonic=sim.time)
    activate(store)
    patches = [mock.patch(f"{name}.time", clock) for name in _CLOCKS]
    pools = [name for name, module in sys.modules.items() if hasattr(module, "ThreadPoolExecutor")]
    patches += [mock.patch(f"{name}.ThreadPoolExecutor", _Serial) for name in pools if name.startswith("pipeline.")]
    patches += [
        mock.patch("secrets.token_hex", lambda n=16: f"{next(made.names):0{2 * n}x}"),
        mock.patch("pipeline.storage.root.random", mock.Mock(uniform=lambda a, b: b / 2)),
        mock.patch.object(Generation, "start_heartbeat", return_value=None),
        mock.patch.object(Root, "open", lambda self, key: io.BytesIO(self.read_bytes(key))),
        mock.patch.object(Root, "ranged", _whole),
        mock.patch("pipeline.storage.root.read_if_match", read_if_match),
    ]
    # Until Python 3.12 a cached property has one lock for all its objects: a process would wait for another's read.
    for kind in (Plan, Dataset, LatentDataset):
        held = [p for p in vars(kind).values() if isinstance(p, cached_property) and hasattr(p, "lock")]
        patches += [mock.patch.object(p, "lock", nullcontext()) for p in held]
    try:
        for patch in patches:
            patch.start()
        yield made
    finally:
        sim.close()
        for patch in patches:
            patch.stop()
        activate(None)
