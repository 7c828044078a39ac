"""Exact deduplication: the first of equal rows stays, whatever the memory, the crashes and the order of runs."""

from __future__ import annotations

import hashlib
import random
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataflow.workers import in_threads
from pipeline.errors import ConflictError, InputError
from pipeline.source.reasons import Reason
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import last_run, latest_number, read_closing
from pipeline.store.ledger.identity import claim_identity
from pipeline.store.ledger.state import read_state
from pipeline.store.maintain import Spread, in_turn
from pipeline.store.maintain import dedup as module
from pipeline.store.maintain.dedup import REASON, first_of_each, is_due, marked, released
from pipeline.store.maintain.verify import verify
from pipeline.store.plan import append_version, read_plan
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.schema import LATENTS
from tests.support.maintain import collect_garbage, compact, deduplicate
from tests.support.rows import IDENTITY, Listed, claim, committer, latent_rows, planned_root, rejected_rows

pytestmark = pytest.mark.integration

Address = tuple[int, int]
PLENTY = 1 << 30
MEMORY_OF_ONE_ROW = 2 * 160


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation that "crashed" in this very process counts as dead at once."""
    monkeypatch.setattr(module, "_ROWS_PER_COMMIT", 2)


def digest(content: str) -> bytes | None:
    return hashlib.sha256(content.encode()).digest() if content else None


def stored_rows(contents: Mapping[Address, str], variants: int = 1) -> pa.Table:
    """Rows of these contents ("" has no hash); a second variant lies in another bucket."""
    tables = []
    for variant, bucket in list(enumerate(["24x32", "32x24"]))[:variants]:
        table = latent_rows(sorted(contents), bucket)
        hashes = pa.array([digest(contents[a]) for a in sorted(contents)], pa.binary(32))
        table = table.set_column(LATENTS.get_field_index("content_sha256"), "content_sha256", hashes)
        number = pa.array(np.full(len(table), variant, np.int32))
        tables.append(table.set_column(LATENTS.get_field_index("variant"), "variant", number))
    return pa.concat_tables(tables).cast(LATENTS)


def encode(root: Root, contents: Mapping[Address, str], variants: int = 1, cuts: int = 3) -> None:
    """Commit these rows under a generation of their own, in fragments of a few rows."""
    generation = claim(root)
    addresses = sorted(contents)
    random.Random(len(addresses)).shuffle(addresses)
    for start in range(0, len(addresses), cuts):
        part = {a: contents[a] for a in addresses[start : start + cuts]}
        committer(root, generation, row_group_bytes=300).commit(stored_rows(part, variants), None, {})
    generation.close({"status": "done"})


def run(root: Root, memory_bytes: int = PLENTY) -> int:
    return deduplicate(root.uri, source_uri="mem", memory_bytes=memory_bytes).duplicates


def visible(uri: str) -> list[Address]:
    dataset = LatentDataset.open(uri)
    tables = [dataset.read(g.index, ["unit", "row"]) for g in dataset.row_groups]
    return sorted({(u, r) for t in tables for u, r in zip(t["unit"].to_pylist(), t["row"].to_pylist(), strict=True)})


def firsts(contents: Mapping[Address, str]) -> list[Address]:
    """What has to stay, in plain Python."""
    kept: dict[str, Address] = {}
    for address in sorted(contents):
        kept.setdefault(contents[address] or str(address), address)
    return sorted(kept.values())


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return planned_root(str(tmp_path / "data"), units=3, rows=4)


# Equal letters are equal bytes; "" stands for a row without a hash, which equals nothing.
CONTENTS: dict[Address, str] = dict(
    zip([(u, r) for u in range(3) for r in range(4)], [*"abca", *"dbea", "f", "f", "", ""], strict=True)
)


def test_the_first_of_equal_rows_stays_and_the_others_are_accounted_for(root: Root) -> None:
    encode(root, CONTENTS)
    assert REASON == Reason.DUPLICATE_CONTENT
    assert Reason(REASON).status == "filtered"
    before = LatentDataset.open(root.uri).digest
    report = deduplicate(root.uri, source_uri="s3://b/photos", memory_bytes=PLENTY)
    assert visible(root.uri) == firsts(CONTENTS)
    assert (report.shares, report.rows_read, report.duplicates) == (1, 12, 12 - len(firsts(CONTENTS)))
    state = read_state(root)
    assert state.num_filtered == report.duplicates
    assert not state.gaps()
    assert LatentDataset.open(root.uri).digest != before
    found = verify(root.uri, "checksums")
    assert found.problems == []
    assert (found.planned_rows, found.stored_rows + found.filtered_rows) == (12, 12)
    files = [pq.read_table(root.local_path(f.info.path)) for f in state.reject_files]
    rows = {(r["unit"], r["row"]): r for t in files for r in t.to_pylist()}
    assert rows[(0, 3)] == {
        "unit": 0,
        "row": 3,
        "uri": "s3://b/photos/u0/r3.png",
        "key": "u0/r3.png",
        "outcome": "filtered",
        "reason": "duplicate_content",
        "message": "same bytes as unit 0 row 0",
    }


def test_nothing_is_left_to_do_afterwards(root: Root) -> None:
    encode(root, CONTENTS)
    assert is_due(root, read_state(root))
    run(root)
    state = read_state(root)
    assert not is_due(root, state)
    assert run(root) == 0
    assert read_state(root).filtered == state.filtered
    assert (read_closing(root, latest_number(root)) or {})["status"] == "done"
    # A later run that changed nothing hands the mark on, one that added rows does not fit it.
    generation = claim(root)
    generation.close({"status": "unchanged", **marked(state)})
    assert not is_due(root, state)


def test_rows_added_later_give_way_to_older_ones(root: Root) -> None:
    first = {a: c for a, c in CONTENTS.items() if a[0] == 1}
    encode(root, first)
    run(root)
    assert visible(root.uri) == firsts(first)
    encode(root, {a: c for a, c in CONTENTS.items() if a[0] == 2})
    assert is_due(root, read_state(root))
    run(root)
    later = {a: c for a, c in CONTENTS.items() if a[0] > 0}
    assert visible(root.uri) == firsts(later)
    # Unit 0 was planned first: where it comes last, it still wins.
    encode(root, {a: c for a, c in CONTENTS.items() if a[0] == 0})
    run(root)
    assert visible(root.uri) == firsts(CONTENTS)
    assert verify(root.uri, "checksums").problems == []


def test_variants_of_a_row_share_its_fate(root: Root) -> None:
    encode(root, CONTENTS, variants=2)
    assert run(root, memory_bytes=MEMORY_OF_ONE_ROW * 4) == 12 - len(firsts(CONTENTS))
    assert visible(root.uri) == firsts(CONTENTS)
    assert LatentDataset.open(root.uri).num_rows == 2 * len(firsts(CONTENTS))
    assert verify(root.uri, "checksums").problems == []


def filtered_rows(root: Root) -> list[dict[str, object]]:
    """What is told of duplicates, row by row."""
    tables = [pq.read_table(root.local_path(f.info.path)) for f in read_state(root).reject_files]
    return sorted((row for t in tables for row in t.to_pylist()), key=lambda row: (row["unit"], row["row"]))


@pytest.mark.parametrize("spread", [in_turn, partial(in_threads, 3)], ids=["in turn", "threads"])
def test_less_memory_means_more_shares_and_the_same_result(tmp_path: Path, spread: Spread) -> None:
    told = []
    for index, memory in enumerate([PLENTY, MEMORY_OF_ONE_ROW * 5, MEMORY_OF_ONE_ROW, 1]):
        root = planned_root(str(tmp_path / str(index)), units=3, rows=4)
        encode(root, CONTENTS)
        steps: list[tuple[int, int]] = []
        report = deduplicate(
            root.uri,
            source_uri="mem",
            memory_bytes=memory,
            spread=spread,
            on_group=lambda *step, steps=steps: steps.append(step),
        )
        assert (report.shares, report.rows_read) == ([1, 3, 12, 12][index], 12)
        assert steps[-1][0] == steps[-1][1]
        assert steps == sorted(steps)
        # Each row with a hash is left once, and where all can be compared at once none is.
        assert sum(info.size_bytes for info in root.list("scratch")) == (10 * module._ROW.itemsize if index else 0)
        told.append(filtered_rows(root))
        assert verify(root.uri, "checksums").problems == []
    assert len(told[0]) == 12 - len(firsts(CONTENTS))
    assert all(rows == told[0] for rows in told)


def test_what_a_deduplication_has_left_is_garbage(root: Root) -> None:
    encode(root, CONTENTS)
    run(root, memory_bytes=MEMORY_OF_ONE_ROW)
    left = [info.key for info in root.list("scratch")]
    assert left
    assert verify(root.uri, "files").orphans == sorted(left)
    assert collect_garbage(root.uri, grace_s=3600) == (0, 0)
    assert collect_garbage(root.uri, grace_s=0, now_s=2**33)[0] == len(left)
    assert list(root.list("scratch")) == []


def test_hashes_that_come_back_changed_are_noticed(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(root, CONTENTS)
    real = Root.read_range

    def read_range(self: Root, key: str, start: int, length: int) -> bytes:
        data = real(self, key, start, length)
        return data[:-1] + b"!" if data and key.startswith("scratch/") else data

    monkeypatch.setattr(Root, "read_range", read_range)
    with pytest.raises(InputError, match="does not hold what was written"):
        run(root, memory_bytes=MEMORY_OF_ONE_ROW)
    monkeypatch.undo()
    assert visible(root.uri) == sorted(CONTENTS)


def test_rows_held_at_a_time_are_bounded_though_one_content_is_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A placeholder image among the photos falls into one share of the hashes however many there are."""
    root = planned_root(str(tmp_path / "d"), units=10, rows=20)
    encode(root, {(u, r): "gone" if r else f"unit {u}" for u in range(10) for r in range(20)}, cuts=5)
    held = []
    monkeypatch.setattr(module, "first_of_each", lambda rows: held.append(len(rows)) or first_of_each(rows))
    assert run(root, memory_bytes=MEMORY_OF_ONE_ROW * 20) == 189
    assert max(held) <= 2 * 20 + 5
    assert verify(root.uri, "checksums").problems == []


def test_hashes_that_share_64_bits_are_not_equal() -> None:
    rows = np.zeros(4, module._ROW)
    rows["hash"] = [[7, 0, 0, 1], [7, 0, 0, 2], [7, 0, 0, 1], [8, 0, 0, 1]]
    rows["address"] = [5, 4, 3, 2]
    first, others, kept = first_of_each(rows)
    assert sorted(first["address"].tolist()) == [2, 3, 4]
    assert (others["address"].tolist(), kept.tolist()) == ([5], [3])


@pytest.mark.parametrize("crash_at", range(3))
def test_a_crash_between_two_commits_costs_nothing(
    root: Root, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    encode(root, CONTENTS)
    real, calls = module.Committer.commit, []

    def commit(self: object, *args: object) -> object:
        calls.append(args)
        if len(calls) > crash_at:
            raise OSError("the machine went away")
        return real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(module.Committer, "commit", commit)
    with pytest.raises(OSError, match="went away"):
        run(root, memory_bytes=MEMORY_OF_ONE_ROW * 5)
    monkeypatch.setattr(module.Committer, "commit", real)
    assert verify(root.uri, "checksums").problems == []
    assert set(visible(root.uri)) >= set(firsts(CONTENTS))
    assert is_due(root, read_state(root))
    run(root)
    assert visible(root.uri) == firsts(CONTENTS)
    assert verify(root.uri, "checksums").problems == []


def test_compaction_drops_the_duplicates_and_garbage_collection_their_bytes(root: Root) -> None:
    encode(root, CONTENTS)
    run(root)
    compact(root.uri, shard_bytes=1 << 20, row_group_bytes=1 << 20)
    collect_garbage(root.uri, grace_s=0, now_s=2**33)
    state = read_state(root)
    assert sum(f.info.rows for f in state.files) == len(firsts(CONTENTS))
    assert not any(f.dead & state.covered for f in state.files)
    report = verify(root.uri, "checksums")
    assert (report.problems, report.orphans) == ([], [])
    assert (report.stored_rows, report.filtered_rows) == (len(firsts(CONTENTS)), 12 - len(firsts(CONTENTS)))
    assert not is_due(root, state)
    assert compact(root.uri, shard_bytes=1 << 20, row_group_bytes=1 << 20).shards_written == 0


def test_the_tracking_run_is_noted_and_a_crash_leaves_it_unfinished(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(root, CONTENTS)
    monkeypatch.setattr(module, "Dataset", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        deduplicate(root.uri, source_uri="mem", memory_bytes=PLENTY, note={"handle": "key:1", "run_id": "r"})
    assert (last_run(root)["handle"], last_run(root)["unfinished"]) == ("key:1", True)
    monkeypatch.undo()
    deduplicate(root.uri, source_uri="mem", memory_bytes=PLENTY, note={"handle": "key:1", "run_id": "r"})
    assert (last_run(root)["run_id"], last_run(root)["unfinished"]) == ("r", False)


def test_another_run_taking_over_stops_it(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(root, CONTENTS)
    real = module.first_of_each

    def take_over(rows: object) -> object:
        claim(root).close({})
        return real(rows)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "first_of_each", take_over)
    with pytest.raises(ConflictError, match="Another run has taken over"):
        run(root)
    assert visible(root.uri) == sorted(CONTENTS)
    assert verify(root.uri, "checksums").problems == []


def test_a_duplicate_comes_back_when_its_first_one_is_gone(root: Root) -> None:
    encode(root, CONTENTS)
    run(root)
    assert not released(root, read_state(root))
    gone = SimpleNamespace(retired=[(0, 0, 1)], removed=1)
    append_version(read_plan(root), [[Listed("new")]], report=gone, source={}, generation=latest_number(root))
    state = read_state(root)
    back = released(root, state)
    assert back.triples() == [[0, 3, 4], [1, 3, 4]]  # both named row 0 of unit 0
    assert state.gaps(back).triples() == [[0, 3, 4], [1, 3, 4], [3, 0, 1]]
    encode(root, {(0, 3): "a", (1, 3): "a", (3, 0): "a"})
    run(root)
    left = {a: c for a, c in CONTENTS.items() if a != (0, 0)} | {(3, 0): "a"}
    assert visible(root.uri) == firsts(left)
    assert not released(root, read_state(root))
    assert verify(root.uri, "checksums").problems == []


def test_filtered_rows_can_be_asked_for_again(root: Root) -> None:
    encode(root, CONTENTS)
    run(root)
    state = read_state(root)
    assert state.gaps(state.retryable([REASON])) == state.filtered[REASON]
    assert state.gaps(state.retryable(["truncated"])).count() == 0


@dataclass(frozen=True)
class Round:
    """What happens before a deduplication: new rows, old rows whose source goes, outages, a compaction."""

    added: list[str]
    failing: set[int]
    removed: set[int]
    variants: int
    memory: int
    crash_at: int
    compacted: bool


rounds = st.builds(
    Round,
    added=st.lists(st.sampled_from("abcd "), max_size=6),
    failing=st.sets(st.integers(0, 20), max_size=3),
    removed=st.sets(st.integers(0, 20), max_size=3),
    variants=st.integers(1, 2),
    memory=st.sampled_from([PLENTY, MEMORY_OF_ONE_ROW * 3, 1]),
    crash_at=st.integers(0, 6),
    compacted=st.booleans(),
)


@dataclass
class World:
    """The source as plain Python sees it."""

    contents: dict[Address, str] = field(default_factory=dict)
    stored: set[Address] = field(default_factory=set)
    units: int = 0


def play(root: Root, world: World, this: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = sorted(world.contents)
    gone = [alive[i] for i in this.removed if i < len(alive)]
    for address in gone:
        del world.contents[address]
        world.stored.discard(address)
    new = {(world.units, r): c.strip() for r, c in enumerate(this.added)}
    entries = [[Listed(f"{world.units}/{r}") for r in range(len(new))]] if new else []
    if new or gone:
        report = SimpleNamespace(retired=[(u, r, r + 1) for u, r in gone], removed=len(gone))
        append_version(read_plan(root), entries, report=report, source={}, generation=latest_number(root))
    world.contents |= new
    world.units += bool(new)
    state = read_state(root)
    todo = state.gaps(state.retryable(["missing"]) | released(root, state))
    rows = [(u, r) for u, a, b in todo.triples() for r in range(a, b)]
    # What was stored once is not rejected the next time: its source has not changed.
    failed = {a for i, a in enumerate(rows) if i in this.failing and a not in world.stored}
    encode(root, {a: world.contents[a] for a in rows if a not in failed}, this.variants, cuts=2)
    generation = claim(root)
    committer(root, generation).commit(LATENTS.empty_table(), rejected_rows(sorted(failed), "missing"), {})
    generation.close({})
    world.stored |= set(rows) - failed
    interrupted(root, this, monkeypatch)
    run(root, this.memory)
    if this.compacted:
        compact(root.uri, shard_bytes=10 * 304, row_group_bytes=200)


def interrupted(root: Root, this: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = module.Committer.commit

    def commit(self: object, *args: object) -> object:
        calls.append(args)
        if len(calls) > this.crash_at:
            raise OSError("crash")
        return real(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(module.Committer, "commit", commit)
        try:
            run(root, this.memory)
        except OSError:
            assert len(calls) > this.crash_at


@settings(max_examples=25, deadline=None)
@given(st.lists(rounds, min_size=1, max_size=4))
def test_whatever_happens_the_first_of_each_content_is_visible(plays: list[Round]) -> None:
    root = Root(f"memory://dedup-{uuid.uuid4().hex}")
    claim_identity(root, IDENTITY)
    world = World()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "_ROWS_PER_COMMIT", 2)
        for this in plays:
            play(root, world, this, monkeypatch)
            present = {a: c for a, c in world.contents.items() if a in world.stored}
            if present:
                assert visible(root.uri) == firsts(present)
            state = read_state(root)
            assert not state.gaps()
            assert not is_due(root, state)
            assert verify(root.uri, "checksums").problems == []
