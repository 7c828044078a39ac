"""Commit records, generations and the fold: what is visible, whoever wrote what, when and how often."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConflictError, InputError
from pipeline.storage import Root
from pipeline.store.dataset import LatentDataset
from pipeline.store.generation import claim_next, latest_number
from pipeline.store.ledger import collect, commit, visible_records
from pipeline.store.record import CommitRecord, parse_record
from pipeline.store.rowset import RowSet
from pipeline.store.state import fold, read_state
from tests.support.rows import claim, committer, latent, latent_rows, planned_root, rejected_rows


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return planned_root(str(tmp_path / "data"), units=4, rows=5)


def rows_of(dataset: LatentDataset) -> list[tuple[int, int]]:
    tables = [dataset.read(g.index, ["unit", "row"]) for g in dataset.row_groups]
    return sorted((u, r) for t in tables for u, r in zip(t["unit"].to_pylist(), t["row"].to_pylist(), strict=True))


def everything(units: int = 4, rows: int = 5) -> list[tuple[int, int]]:
    return [(u, r) for u in range(units) for r in range(rows)]


def test_a_commit_makes_its_rows_visible_and_leaves_the_rest_as_gaps(root: Root) -> None:
    generation = claim(root)
    committer(root, generation).commit(
        latent_rows([(0, 0), (0, 1), (2, 4)]), rejected_rows([(1, 2)], "truncated"), {}
    )
    state = read_state(root)
    assert (state.num_stored, state.num_rejected, state.num_filtered) == (3, 1, 0)
    assert state.rejects["truncated"].triples() == [[1, 2, 3]]
    done = {(0, 0), (0, 1), (2, 4), (1, 2)}
    assert state.gaps() == RowSet.from_triples([(u, r, r + 1) for u, r in everything() if (u, r) not in done])
    dataset = LatentDataset.open(root.uri)
    assert rows_of(dataset) == [(0, 0), (0, 1), (2, 4)]


def test_writing_the_same_rows_twice_changes_nothing(root: Root) -> None:
    writer = committer(root, claim(root))
    first = writer.commit(latent_rows([(0, 0), (0, 1)]), None, {})
    again = writer.commit(latent_rows([(0, 1), (0, 0)]), None, {})
    assert first is not None
    assert again is not None
    assert first.name == again.name
    assert len(visible_records(root)) == 1


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=8), min_size=1, max_size=8))
def test_overlapping_writes_show_every_row_once(writes: list[list[int]]) -> None:
    """Whatever ranges Ray repeats in whatever cut, each row is visible once and the channel sums are exact."""
    memory = Root(f"memory://overlap-{uuid.uuid4().hex}")
    root = planned_root(memory.uri, units=4, rows=5)
    generation = claim(root)
    generation.abandon()
    for number, rows in enumerate(writes):
        if number == len(writes) // 2:
            generation = claim(root)
            generation.abandon()
        committer(root, generation, row_group_bytes=200).commit(
            latent_rows([(i // 5, i % 5) for i in set(rows)]), None, {}
        )
    wanted = sorted({(i // 5, i % 5) for rows in writes for i in rows})
    dataset = LatentDataset.open(root.uri)
    assert rows_of(dataset) == wanted
    assert dataset.num_rows == len(wanted)
    values = np.stack([latent(u, r).astype(np.float16).astype(np.float64) for u, r in wanted])
    np.testing.assert_allclose(dataset.channel_mean, values.mean(axis=(0, 2, 3)), atol=1e-9)
    np.testing.assert_allclose(dataset.channel_std, values.std(axis=(0, 2, 3)), atol=1e-9)


def test_a_retried_reject_replaces_the_older_outcome(root: Root) -> None:
    first = claim(root)
    committer(root, first).commit(latent_rows([(0, 0)]), rejected_rows([(0, 1), (0, 2)], "missing"), {})
    first.close({"status": "done"})
    second = claim(root)
    state = read_state(root)
    retry = state.retryable(["missing"])
    assert RowSet.from_triples([(0, 1, 3)]) - state.gaps(retry) == RowSet.empty()
    assert RowSet.from_triples([(0, 1, 3)]) & state.gaps() == RowSet.empty()
    committer(root, second).commit(latent_rows([(0, 1)]), rejected_rows([(0, 2)], "corrupt"), {})
    state = read_state(root)
    assert (state.num_stored, state.num_rejected) == (2, 1)
    assert list(state.rejects) == ["corrupt"]


def test_a_zombie_never_becomes_visible(root: Root) -> None:
    old = claim(root)
    zombie = committer(root, old)
    zombie.commit(latent_rows([(0, 0)]), None, {})
    old.abandon()
    new = claim(root)
    with pytest.raises(ConflictError, match="Another run has taken over"):
        zombie.commit(latent_rows([(0, 1), (0, 2)]), None, {})
    assert rows_of(LatentDataset.open(root.uri)) == [(0, 0)]
    committer(root, new).commit(latent_rows([(0, 1)]), None, {})
    assert rows_of(LatentDataset.open(root.uri)) == [(0, 0), (0, 1)]
    # The zombie's record is still in no later state, however many generations follow.
    new.close({})
    claim(root).close({})
    assert rows_of(LatentDataset.open(root.uri)) == [(0, 0), (0, 1)]


def test_only_one_of_many_claims_wins(root: Root) -> None:
    barrier, outcomes = threading.Barrier(8), []

    def contend() -> None:
        barrier.wait()
        try:
            outcomes.append(claim(root).number)
        except ConflictError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    numbers = [o for o in outcomes if isinstance(o, int)]
    # A late starter may see the winner's claim and, since nobody counts as alive here, fence it: but no number twice.
    assert numbers
    assert len(set(numbers)) == len(numbers)
    assert latest_number(root) == max(numbers)


def test_a_living_owner_is_left_alone(root: Root) -> None:
    """Two runs at once: the one that finds a heartbeat steps back with a conflict."""
    generation = claim(root)
    code = (
        "import sys; from pipeline.storage import Root; from pipeline.store.ledger import collect\n"
        "from pipeline.store.generation import claim_next\n"
        "root = Root(sys.argv[1])\n"
        "claim_next(root, lambda n: collect(root, n), job='other', patience_s=30)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, root.uri], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "Another run is writing" in done.stderr
    generation.check()
    generation.close({})


def test_a_dead_owner_of_this_machine_is_replaced_at_once(root: Root) -> None:
    code = (
        "import os, sys; from pipeline.storage import Root; from pipeline.store.ledger import collect\n"
        "from pipeline.store.generation import claim_next\n"
        "root = Root(sys.argv[1])\n"
        "claim_next(root, lambda n: collect(root, n), job='other'); os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", code, root.uri], timeout=120, check=False)
    assert latest_number(root) == 1
    generation = claim_next(root, lambda n: collect(root, n), job="test", patience_s=3600)
    assert generation.number == 2
    generation.close({})


def test_claims_bundle_older_records(root: Root) -> None:
    for i in range(12):
        generation = claim(root)
        committer(root, generation).commit(latent_rows([(i // 5, i % 5)]), None, {})
        generation.close({})
    last = claim(root)
    assert len(last.bundles) <= 8
    assert rows_of(LatentDataset.open(root.uri)) == everything()[:12]
    last.close({})


def test_records_survive_the_round_trip_and_damage_is_named(root: Root) -> None:
    record = committer(root, claim(root)).commit(latent_rows([(0, 0)]), rejected_rows([(1, 1)], "empty"), {3: 5})
    assert record is not None
    assert parse_record(record.to_bytes(), "x").to_bytes() == record.to_bytes()
    with pytest.raises(InputError, match="commit record ledger/x is damaged"):
        parse_record(record.to_bytes()[:-3], "ledger/x")
    newer = json.loads(record.to_bytes()) | {"version": 99}
    with pytest.raises(InputError, match="has version 99"):
        parse_record(json.dumps(newer).encode(), "ledger/x")


def test_a_damaged_bundle_is_named(root: Root) -> None:
    generation = claim(root)
    committer(root, generation).commit(latent_rows([(0, 0)]), None, {})
    generation.close({})
    (bundle,) = claim(root).bundles
    path = root.local_path(bundle)
    assert path is not None
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"ledger bundle .* cannot be read"):
        read_state(root)


def test_units_of_unknown_length_end_where_reading_found_the_end(tmp_path: Path) -> None:
    from pipeline.store.identity import claim_identity
    from pipeline.store.plan import append_version, read_plan
    from tests.support.rows import IDENTITY, Listed

    root = Root(str(tmp_path / "d"))
    claim_identity(root, IDENTITY)
    append_version(read_plan(root), [[Listed("a.tar", row_stop=None)]], source={}, generation=0)
    generation = claim(root)
    writer = committer(root, generation)
    writer.commit(latent_rows([(0, 0), (0, 2)]), None, {})
    assert read_state(root).gaps().triples() == [[0, 1, 2], [0, 3, 1 << 31]]
    writer.commit(latent_rows([(0, 1)]), None, {0: 4})
    assert read_state(root).gaps().triples() == [[0, 3, 4]]
    generation.close({})


def test_the_state_does_not_depend_on_which_record_is_folded_first(root: Root) -> None:
    writer = committer(root, claim(root))
    for chunk in ([(0, 0), (0, 1)], [(0, 1), (0, 2)], [(3, 3)]):
        writer.commit(latent_rows(chunk), None, {})
    records = visible_records(root)
    plan = read_state(root).plan
    assert fold(plan, records).covered == fold(plan, list(reversed(records))).covered


def test_an_unknown_outcome_is_settled_by_committing_again(root: Root) -> None:
    """The answer to a commit got lost: the same record again lands on the same name."""
    record = CommitRecord(generation=claim(root).number, covered=RowSet.from_triples([(0, 0, 1)]))
    assert commit(root, record) is True
    assert commit(root, record) is False
    assert len(visible_records(root)) == 1
