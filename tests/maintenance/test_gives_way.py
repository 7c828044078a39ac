"""A compaction stands in no writer's way: whoever comes takes over at once, and it goes on another time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.errors import ConflictError, StoppedError
from pipeline.maintenance import job
from pipeline.maintenance.config import CompactJobConfig
from pipeline.maintenance.job import run_compact
from pipeline.result import JobResult
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import read_closing
from pipeline.store.ledger.ledger import claimed
from pipeline.store.maintain.verify import verify
from tests.support.rows import claim, committer, latent_rows, planned_root

UNITS, ROWS = 24, 40


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    root, chance = planned_root(str(tmp_path / "data"), UNITS, ROWS), random.Random(0)
    generation = claim(root)
    for unit in chance.sample(range(UNITS), UNITS):
        committer(root, generation).commit(latent_rows([(unit, row) for row in range(ROWS)]), None, {})
    generation.close({"status": "done"})
    return root


def compacted(root: Root) -> JobResult:
    settings = [f"data.uri={root.uri}", "tracking.enabled=false", "shard_bytes=65536", "workers=1"]
    return run_compact(load_config(CompactJobConfig, [], settings))


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The jobs that come while a compaction writes, one after each shard; each lives until the test ends."""
    jobs: list[str] = []
    plain = job.compact
    with ExitStack() as living:

        def compact(generation, *, on_shard, **settings):  # type: ignore[no-untyped-def]
            def meet(done: int, total: int) -> None:
                on_shard(done, total)
                if jobs:
                    living.enter_context(claimed(generation.root, jobs.pop(0), patience_s=30.0))

            return plain(generation, on_shard=meet, **settings)

        monkeypatch.setattr(job, "compact", compact)
        yield jobs


@pytest.mark.parametrize("other", ["encode", "forget"])
def test_it_gives_way_to_a_job_that_writes_and_goes_on_later(root: Root, met: list[str], other: str) -> None:
    met.append(other)
    with pytest.raises(StoppedError, match=f"{other} has begun to write [^\n]* gives way") as stopped:
        compacted(root)
    assert "the same command again" in str(stopped.value)
    assert read_closing(root, 2) == {"status": "StoppedError"}
    with claimed(root, other, patience_s=0.0):  # the other's run, which the test ends for it
        pass
    result = compacted(root)
    assert result.counts["shards_kept"] >= 1
    assert result.counts["shards_written"] >= 1
    report = verify(root.uri, "checksums")
    assert (report.problems, report.stored_rows) == ([], UNITS * ROWS)
    assert compacted(root).status == "unchanged"


@pytest.mark.parametrize("other", ["compact", "gc"])
def test_it_gives_way_to_no_other_upkeep(root: Root, met: list[str], other: str) -> None:
    met.append(other)
    with pytest.raises(ConflictError, match="Another run is writing"):
        compacted(root)


def test_it_steps_back_from_one_that_writes_already(root: Root) -> None:
    with claimed(root, "encode"), pytest.raises(ConflictError, match="Another run is writing"):
        compacted(root)
