"""What the compact and verify jobs and an encode job's end do to a dataset, each under a generation of its own.

A generation that "crashed" in this very process counts as dead at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.storage.root import Root
from pipeline.store.ledger.generation import note_run
from pipeline.store.ledger.identity import read_identity
from pipeline.store.ledger.ledger import claimed
from pipeline.store.maintain import compact as _compact
from pipeline.store.maintain import dedup as _dedup
from pipeline.store.maintain import verify as _verify


def compact(uri: str, *, seed: int | None = None, **settings: Any) -> _compact.CompactReport:
    read_identity(Root(uri))
    noted = _compact.arranged(seed)
    with claimed(Root(uri), "compact", note=lambda: noted, patience_s=0.0) as generation:
        return _compact.compact(generation, seed=seed, **settings)


def deduplicate(uri: str, *, note: Mapping[str, Any] | None = None, **settings: Any) -> _dedup.DedupReport:
    read_identity(Root(uri))
    with claimed(Root(uri), "dedup", patience_s=0.0) as generation:
        if note is not None:
            note_run(generation.root, generation.number, dict(note))
        return _dedup.deduplicate(generation, **settings)


def collect_garbage(uri: str, grace_s: float, now_s: float | None = None) -> tuple[int, int]:
    read_identity(Root(uri))
    if not _verify.has_garbage(Root(uri), grace_s, now_s):
        return 0, 0
    with claimed(Root(uri), "gc", patience_s=0.0) as generation:
        return _verify.collect_garbage(generation, grace_s, now_s)
