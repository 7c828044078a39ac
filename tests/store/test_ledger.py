"""Commit records, generations and the fold: what is visible, whoever wrote what, when and how often."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConflictError, InputError
from pipeline.storage.root import Root
from pipeline.store.ledger import layout
from pipeline.store.ledger.bundles import read_bundle, seal
from pipeline.store.ledger.generation import claim_next, latest_number, newest_of, read_closing
from pipeline.store.ledger.identity import claim_identity
from pipeline.store.ledger.ledger import collect, commit, visible_records
from pipeline.store.ledger.record import CommitRecord, FileInfo, parse_record
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.ledger.state import fold, read_state
from pipeline.store.maintain.verify import verify
from pipeline.store.plan import Plan, PlanVersion, append_version, read_plan
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.read.row_groups import RowGroupInfo, RowGroups
from tests.support.maintain import compact
from tests.support.rows import IDENTITY, Listed, claim, committer, latent, latent_rows, planned_root, rejected_rows


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


def test_a_data_file_alone_says_how_its_latents_become_tensors(root: Root) -> None:
    compacting = claim(root)
    committer(root, compacting).commit(latent_rows([(0, 0), (0, 1)]), None, {})
    compacting.close({"status": "done"})
    assert compact(root.uri, shard_bytes=1 << 20, row_group_bytes=1 << 20, seed=0).shards_written == 1
    (file,) = LatentDataset.open(root.uri).files()
    table = pq.read_table(file.uri)
    told = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    assert (told["latentloom.kind"], told["latentloom.format_version"]) == ("latents", "2")
    assert "raw" in told["latentloom.latent_layout"]
    for row in table.to_pylist():
        values = np.frombuffer(row["latent"], f"<{np.dtype(told['latentloom.latent_dtype']).str[1:]}")
        wanted = latent(row["unit"], row["row"]).astype(np.float16)
        assert np.array_equal(values.reshape(row["latent_shape"]), wanted)


def test_a_row_that_is_stored_and_left_out_is_not_committed(root: Root) -> None:
    writer = committer(root, claim(root))
    with pytest.raises(ValueError, match=r"both stored and left out: \[\[0, 1, 2\]\]"):
        writer.commit(latent_rows([(0, 0), (0, 1)]), rejected_rows([(0, 1)], "truncated"), {})
    assert not len(visible_records(root))


@pytest.mark.integration
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


@pytest.mark.integration
def test_a_living_owner_is_left_alone(root: Root) -> None:
    """Two runs at once: the one that finds a heartbeat steps back with a conflict."""
    generation = claim(root)
    code = (
        "import sys; from pipeline.storage.root import Root; from pipeline.store.ledger.ledger import collect\n"
        "from pipeline.store.ledger.generation import claim_next\n"
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
        "import os, sys; from pipeline.storage.root import Root; from pipeline.store.ledger.ledger import collect\n"
        "from pipeline.store.ledger.generation import claim_next\n"
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


def test_what_a_compaction_has_replaced_is_in_no_later_list(root: Root) -> None:
    """Fragments of whose rows all are elsewhere by now go; what still tells something stays."""
    generation = claim(root)
    writer = committer(root, generation)
    for unit in range(4):
        for row in range(5):
            writer.commit(latent_rows([(unit, row)]), None, {unit: 5} if (unit, row) == (3, 4) else {})
    generation.close({"status": "done"})
    before = read_state(root)
    assert compact(root.uri, shard_bytes=10 * 304, row_group_bytes=5 * 48).shards_written == 2
    digest, rows = LatentDataset.open(root.uri).digest, rows_of(LatentDataset.open(root.uri))
    assert len(visible_records(root)) == 22
    claim(root).close({})
    assert [record.generation for _, record in visible_records(root)] == [1, 2, 2]
    after = read_state(root)
    assert (after.covered, after.unit_rows, after.gaps()) == (before.covered, {3: 5}, before.gaps())
    assert (LatentDataset.open(root.uri).digest, rows_of(LatentDataset.open(root.uri))) == (digest, rows)
    assert verify(root.uri, "checksums").problems == []


def test_outcomes_and_lengths_of_what_was_compacted_are_told_by_few_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A year of fragments with rejects, of units whose length only reading told: one record a shard, and one more."""
    root = Root(str(tmp_path / "d"))
    claim_identity(root, IDENTITY)
    units = [[Listed(f"{u:03}.tar", row_stop=None)] for u in range(12)]
    append_version(read_plan(root), units, source={}, generation=0)
    generation = claim(root)
    for unit in range(12):
        outcomes = pa.concat_tables(
            [rejected_rows([(unit, 1)], "truncated"), rejected_rows([(unit, 2)], "too_small", outcome="filtered")]
        )
        committer(root, generation).commit(latent_rows([(unit, 0)]), outcomes, {})
        committer(root, generation).commit(latent_rows([(unit, 3)]), None, {unit: 4})
    generation.close({"status": "done"})
    before, digest = read_state(root), LatentDataset.open(root.uri).digest
    assert not before.gaps()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    sizes = {"shard_bytes": 40 * 304, "row_group_bytes": 5 * 48}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pipeline.store.maintain.compact._tell_range", die)
        compact(root.uri, **sizes)
    report = compact(root.uri, **sizes)
    assert (report.shards_written, report.ranges_told) == (0, 1)
    assert compact(root.uri, **sizes).ranges_told == 0
    claim(root).close({})
    assert len(visible_records(root)) == 2
    after = read_state(root)
    assert (after.covered, after.rejects, after.filtered) == (before.covered, before.rejects, before.filtered)
    assert (after.unit_rows, after.gaps()) == (before.unit_rows, before.gaps())
    assert len(after.reject_files) == 1
    assert LatentDataset.open(root.uri).digest == digest
    assert verify(root.uri, "checksums").problems == []
    # What was told anew can be tried again, and a night's few fragments leave the range as it is.
    generation = claim(root)
    committer(root, generation).commit(latent_rows([(5, 1)]), rejected_rows([(6, 1)], "corrupt"), {})
    generation.close({"status": "done"})
    assert compact(root.uri, **sizes).ranges_told == 0
    assert read_state(root).rejects["truncated"].count() == 10
    assert read_state(root).rejects["corrupt"].triples() == [[6, 1, 2]]


def scattered(units: int = 2) -> RowSet:
    """Every third row of some units of 1,000: more runs than intervals are worth, and a run at the end."""
    return RowSet.from_triples([(u, r, r + 1) for u in range(units) for r in range(0, 1000, 3)] + [(9, 5, 700)])


def test_a_record_of_scattered_rows_is_small_and_survives_the_round_trip(root: Root) -> None:
    group = RowGroupInfo("8x8", 3, 9, 0, 1, (1.5,), (2.5,), 48, 7, 1, (0, 0, 0, 0, 1, 1, 3))
    info = FileInfo("data/x.parquet", 9, "00", 3, RowGroups.of([group]))
    record = CommitRecord(
        claim(root).number,
        scattered() | RowSet.from_triples([(0, 0, 2000)]),
        files=(info,),
        reject_file=FileInfo("rejects/y.parquet", 5, "11", 2),
        rejects={"empty": RowSet.from_triples([(0, 1, 2)])},
        filtered={"too_small": scattered(), "too_wide": RowSet.from_triples([(0, 1, 2)])},
        unit_rows={4: 17},
    )
    body = json.loads(record.to_bytes())
    assert body["version"] == 2, "earlier releases are to refuse what they cannot read"
    assert len(json.dumps(body["filtered"]["too_small"])) < 1000 < len(json.dumps(scattered().triples()))
    assert parse_record(record.to_bytes(), "x") == record
    commit(root, record)
    assert list(visible_records(root)) == [(record.name, record)]
    assert seal(root, record.generation, at_least=1)
    root.delete(record.name)
    assert list(visible_records(root)) == [(record.name, record)]
    assert record.name == visible_records(root)[0][1].name, "its name follows from what a bundle tells of it"


@pytest.mark.parametrize(
    "broken",
    [
        {"blocks": [[0, 1]]},
        {"blocks": [[0, -512]]},
        {"blocks": [[1 << 31, 0]]},
        {"bits": "AAAA"},
        {"bits": "no base64!"},
        {"blocks": "x"},
    ],
)
def test_a_bitmap_that_is_none_is_damage(root: Root, broken: dict[str, Any]) -> None:
    record = CommitRecord(claim(root).number, scattered(1))
    body = json.loads(record.to_bytes())
    body["covered"] |= broken
    with pytest.raises(InputError, match="commit record x is damaged"):
        parse_record(json.dumps(body).encode(), "x")


def test_to_an_earlier_release_a_bundle_says_that_it_is_too_old(root: Root) -> None:
    """What it read of a bundle were the columns name and record, of which it read the version first."""
    generation = claim(root)
    committer(root, generation).commit(latent_rows([(0, 0)]), None, {})
    key = seal(root, generation.number, at_least=1)
    assert key is not None
    with root.open(key) as file:
        table = pq.read_table(file, columns=["name", "record"])
    assert table["name"].to_pylist() == [name for name, _ in visible_records(root)]
    (said,) = [json.loads(data) for data in table["record"].to_pylist()]
    assert said["version"] == 2
    assert set(said) == set(json.loads(visible_records(root)[0][1].to_bytes()))


def test_a_bundle_of_an_earlier_release_is_read(root: Root) -> None:
    """(name, bytes of the record) a line."""
    generation = claim(root)
    writer = committer(root, generation)
    writer.commit(latent_rows([(0, 0)]), rejected_rows([(1, 1)], "empty"), {3: 5})
    writer.commit(latent_rows([(0, 1)]), None, {})
    records = dict(visible_records(root))
    lines = {"name": list(records), "record": [record.to_bytes() for record in records.values()]}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(lines), sink, write_page_checksum=True)
    root.put(f"{layout.ledger_dir(generation.number)}/{'0' * 32}.parquet", sink.getvalue().to_pybytes())
    for name in records:
        root.delete(name)
    assert dict(visible_records(root)) == records


def test_records_and_bundles_that_tell_nothing_of_held_out_rows_are_read(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier releases wrote them; beside one that tells."""
    generation = claim(root)
    with monkeypatch.context() as before:
        before.setattr("pipeline.store.writer.usually_held_out", lambda rows: ())
        committer(root, generation).commit(latent_rows([(0, row) for row in range(9)]), None, {})
    ((name, record),) = visible_records(root)
    assert "held" not in json.loads(root.read_bytes(name))["files"][0]["groups"]
    sink = pa.BufferOutputStream()
    table = visible_records(root).table.drop_columns(["group_held"])
    pq.write_table(table, sink, write_page_checksum=True)
    root.put(f"{layout.ledger_dir(generation.number)}/{'0' * 32}.parquet", sink.getvalue().to_pybytes())
    root.delete(name)
    assert list(visible_records(root)) == [(name, record)]
    committer(root, generation).commit(latent_rows([(1, row) for row in range(300)]), None, {})
    groups = LatentDataset.open(root.uri).row_groups
    told = groups.held_out(0.1)
    assert told is not None
    assert told[0] == -1
    assert (told[1:] >= 0).all()
    assert 15 < told[1:].sum() < 50
    assert groups.held_out(0.11) is None


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("set_kind", [1]),
        ("set_spans", [2]),
        ("span_keys", [5]),
        ("span_keys", [-5, 1]),
        ("file_path", ["../x"]),
        ("group_bucket", ["x"]),
        ("group_numbers", [1]),
        ("group_sums", [1.0]),
        ("group_held", [0]),
        ("group_held", [0, 0, 0, 0, 0, 0, 2]),
        ("group_held", [0, 1, 0, 0, 1, 1, 1]),
        ("group_held", [-1, 0, 0, 0, 1, 1, 1]),
        ("unit_rows", [0, -1]),
    ],
)
def test_a_bundle_whose_columns_do_not_fit_is_damage(root: Root, column: str, value: list[Any]) -> None:
    generation = claim(root)
    committer(root, generation).commit(latent_rows([(0, 0)]), None, {})
    table = visible_records(root).table
    at = table.schema.get_field_index(column)
    table = table.set_column(at, table.schema.field(at), pa.array([value], table.schema.field(at).type))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    root.put(f"{layout.ledger_dir(generation.number)}/{'0' * 32}.parquet", sink.getvalue().to_pybytes())
    with pytest.raises(InputError, match=r"0{32}.parquet cannot be read[\s\S]*delete this one object"):
        visible_records(root)


def test_a_damaged_bundle_is_named(root: Root) -> None:
    generation = claim(root)
    committer(root, generation).commit(latent_rows([(0, 0)]), None, {})
    generation.close({})
    (bundle,) = claim(root).bundles
    path = root.local_path(bundle)
    assert path is not None
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"snapshots/.*parquet cannot be read"):
        read_state(root)


@pytest.fixture
def one_tar(tmp_path: Path) -> Root:
    """A root whose plan holds one unit of unknown length."""
    root = Root(str(tmp_path / "d"))
    claim_identity(root, IDENTITY)
    append_version(read_plan(root), [[Listed("a.tar", row_stop=None)]], source={}, generation=0)
    return root


def test_units_of_unknown_length_end_where_reading_found_the_end(one_tar: Root) -> None:
    root = one_tar
    generation = claim(root)
    writer = committer(root, generation)
    writer.commit(latent_rows([(0, 0), (0, 2)]), None, {})
    assert read_state(root).gaps().triples() == [[0, 1, 2], [0, 3, 1 << 31]]
    writer.commit(latent_rows([(0, 1)]), None, {0: 4})
    assert read_state(root).gaps().triples() == [[0, 3, 4]]
    generation.close({})


def test_whoever_tries_the_last_row_of_a_tar_again_reads_to_its_end(one_tar: Root) -> None:
    first = claim(one_tar)
    # The tar could not be read on from its third row: what that row stands for is not known.
    committer(one_tar, first).commit(latent_rows([(0, 0), (0, 1)]), rejected_rows([(0, 2)], "read_failed"), {0: 3})
    first.close({"status": "done"})
    state = read_state(one_tar)
    assert state.gaps().triples() == []
    retry = state.retryable(["read_failed"])
    assert state.gaps(retry).triples() == [[0, 2, 1 << 31]]

    # It is tried again, and ends before the end of the tar was reached.
    second = claim(one_tar)
    committer(one_tar, second).commit(latent_rows([(0, 2)]), None, {})
    assert read_state(one_tar).gaps().triples() == [[0, 3, 1 << 31]]
    second.close({})
    third = claim(one_tar)
    assert read_state(one_tar).gaps().triples() == [[0, 3, 1 << 31]]
    committer(one_tar, third).commit(latent_rows([(0, 3)]), None, {0: 4})
    assert read_state(one_tar).gaps().triples() == []
    assert read_state(one_tar).unit_rows == {0: 4}
    third.close({"status": "done"})


def test_a_last_row_that_is_rejected_again_or_turns_out_to_be_the_last_settles_its_tar(one_tar: Root) -> None:
    first = claim(one_tar)
    committer(one_tar, first).commit(latent_rows([(0, 0)]), rejected_rows([(0, 1)], "read_failed"), {0: 2})
    second = claim(one_tar)
    committer(one_tar, second).commit(latent_rows([]), rejected_rows([(0, 1)], "read_failed"), {0: 2})
    assert read_state(one_tar).gaps().triples() == []
    third = claim(one_tar)
    committer(one_tar, third).commit(latent_rows([(0, 1)]), None, {0: 2})
    assert read_state(one_tar).gaps().triples() == []
    third.close({"status": "done"})


def test_of_two_readings_in_one_run_the_one_that_came_further_tells_the_length(one_tar: Root) -> None:
    generation = claim(one_tar)
    writer = committer(one_tar, generation)
    writer.commit(latent_rows([(0, 0)]), rejected_rows([(0, 1)], "read_failed"), {0: 2})
    writer.commit(latent_rows([(0, 1), (0, 2), (0, 3)]), None, {0: 4})
    state = read_state(one_tar)
    assert state.unit_rows == {0: 4}
    assert state.gaps().triples() == []
    generation.close({"status": "done"})


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


record_shapes = st.tuples(
    st.integers(1, 3),
    st.sets(st.integers(0, 11), min_size=1),
    st.sets(st.integers(0, 11)),
)


@settings(deadline=None)
@given(st.lists(record_shapes, max_size=6), st.sets(st.integers(0, 11)), st.sampled_from((1, 40)))
def test_the_fold_is_its_rules_row_by_row(
    shapes: list[tuple[int, set[int], set[int]]], retired: set[int], each: int
) -> None:
    """Each live row is in one file; a file tells only its own dead rows; one without a live row is not there.

    Each number stands for one row, or for so many, eight apart: those of several numbers lie scattered.
    """

    def triples(numbers: set[int]) -> list[tuple[int, int, int]]:
        return [(n // 4, row, row + 1) for n in numbers for row in range(2 * (n % 4), 2 * (n % 4) + 8 * each, 8)]

    def rows(numbers: set[int]) -> RowSet:
        return RowSet.from_triples(triples(numbers))

    def file(kind: str, at: int, rows: set[int]) -> FileInfo:
        return FileInfo(f"{kind}/{at}", 10, "00", len(rows))

    named = []
    for at, (generation, covered, bad) in enumerate(shapes):
        bad, stored = covered & bad, covered - bad
        record = CommitRecord(
            generation,
            rows(covered),
            files=(file("data", at, stored),) if stored else (),
            reject_file=file("rejects", at, bad) if bad else None,
            rejects={"corrupt": rows(bad)} if bad else {},
        )
        named.append((f"{at}", record))
    state = fold(Plan(Root("memory://none"), (retiring(triples(retired)),)), named)
    owner = {}
    for row in set(range(12)) - retired:
        holders = [(-shape[0], row in shape[2], at) for at, shape in enumerate(shapes) if row in shape[1]]
        if holders:
            owner[row] = min(holders)[2]
    wanted_files, wanted_rejects = {}, {}
    for at, (_, covered, bad) in enumerate(shapes):
        for kind, held, wanted in (
            ("data", covered - bad, wanted_files),
            ("rejects", covered & bad, wanted_rejects),
        ):
            dead = {row for row in held if owner.get(row) != at}
            if held - dead:
                wanted[f"{kind}/{at}"] = rows(dead)
    assert {f.info.path: f.dead for f in state.files} == wanted_files
    assert {f.info.path: f.dead for f in state.reject_files} == wanted_rejects
    assert state.covered == rows(set(owner))
    corrupt = {row for row, at in owner.items() if row in shapes[at][2]}
    assert state.rejects == ({"corrupt": rows(corrupt)} if corrupt else {})
    assert state.stored == rows(set(owner) - corrupt)


def retiring(retired: list[tuple[int, int, int]]) -> PlanVersion:
    return PlanVersion(1, "plan/parts/none.parquet", (), 0, 0, 0, 0, tuple(retired), 0, {}, 1)


# -- seals: bundles of the newest generation's own records ------------------------------------------------------


def records_of(generation: int, count: int, first: int = 0) -> list[CommitRecord]:
    return [
        CommitRecord(generation, RowSet.from_triples([(n // 1000, n % 1000, n % 1000 + 1)]))
        for n in range(first, first + count)
    ]


class Watched(Root):
    """A root that runs a check after every object put, and counts whole-object reads."""

    check: Callable[[], None] | None = None
    reads: list[str]

    def put_if_absent(self, key: str, data: bytes) -> bool:
        created = super().put_if_absent(key, data)
        if self.check is not None:
            self.check()
        return created

    def read_bytes(self, key: str) -> bytes:
        self.reads.append(key)
        return super().read_bytes(key)


def test_what_a_run_leaves_behind_is_opened_with_few_reads(root: Root) -> None:
    """The records of the newest generation, which no claim has bundled yet, are not read one by one."""
    generation = claim(root)
    for record in records_of(generation.number, 200):
        commit(root, record)
    before = visible_records(root)
    generation.close({"status": "done"})
    watched = Watched(root.uri)
    watched.reads = []
    assert [name for name, _ in visible_records(watched)] == [name for name, _ in before]
    assert len([key for key in watched.reads if key.startswith("ledger/")]) == 0
    assert collect(watched, generation.number) != []
    assert len([key for key in watched.reads if key.startswith("ledger/")]) == 0


def test_a_small_run_leaves_no_seal(root: Root) -> None:
    generation = claim(root)
    commit(root, records_of(generation.number, 1)[0])
    generation.close({})
    assert len(list(root.list("ledger"))) == 1


def test_a_run_that_must_stop_at_once_does_not_seal(root: Root) -> None:
    generation = claim(root)
    for record in records_of(generation.number, 100):
        commit(root, record)
    generation.close({"status": "StoppedError"}, sealed=False)
    assert len(list(root.list("ledger"))) == 100


def test_the_same_is_visible_at_every_step_of_closing(root: Root) -> None:
    """A reader that opens, or a kill, between any two writes: closing note, seal, announcement, bundle, claim."""
    watched = Watched(root.uri)
    watched.reads = []
    generation = claim(watched)
    for record in records_of(generation.number, 80):
        commit(root, record)
    wanted = [name for name, _ in visible_records(root)]
    steps = 0

    def same() -> None:
        nonlocal steps
        steps += 1
        assert [name for name, _ in visible_records(root)] == wanted

    watched.check = same
    generation.close({"status": "done"})
    assert steps == 2
    claim(watched).abandon()
    assert steps == 5


def test_a_late_writer_of_a_sealed_generation_counts_until_the_next_claim_and_not_after(root: Root) -> None:
    """Sealing fences nobody off and lets nobody in: a claim alone does."""
    old = claim(root)
    *early, late, zombie = records_of(old.number, 102)
    for record in early:
        commit(root, record)
    old.close({"status": "done"})
    assert commit(root, late) is True
    assert len(visible_records(root)) == 101
    assert seal(root, old.number) is None  # one loose record is not worth an object
    new = claim(root)
    assert len(visible_records(root)) == 101
    with pytest.raises(ConflictError, match="Another run has taken over"):
        commit(root, zombie)
    # Not even a zombie that seals what it wrote too late brings it back.
    assert seal(root, old.number, at_least=1) is not None
    assert len(visible_records(root)) == 101
    new.close({})
    claim(root).close({})
    assert len(visible_records(root)) == 101


def test_sealing_goes_on_where_it_stopped_and_two_may_do_it_at_once(root: Root) -> None:
    number = claim(root).number
    for record in records_of(number, 70):
        commit(root, record)
    first = seal(root, number)
    assert first is not None
    assert seal(root, number) is None
    for record in records_of(number, 70, first=70):
        commit(root, record)
    barrier, keys = threading.Barrier(2), []

    def contend() -> None:
        barrier.wait()
        keys.append(seal(root, number))

    threads = [threading.Thread(target=contend) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(visible_records(root)) == 140
    held = [name for key in {first, *keys} - {None} for name, _ in read_bundle(root, key)]
    assert set(held) == {name for name, _ in visible_records(root)}
    assert len(held) == 140


def test_a_damaged_record_is_not_sealed_but_named(root: Root) -> None:
    generation = claim(root)
    for record in records_of(generation.number, 70):
        commit(root, record)
    victim = next(iter(root.list("ledger"))).key
    root.put(victim, root.read_bytes(victim)[:-3])
    generation.close({})
    with pytest.raises(InputError, match=f"commit record {victim} is damaged"):
        visible_records(root)


def test_a_damaged_seal_is_named_and_can_be_deleted(root: Root) -> None:
    generation = claim(root)
    for record in records_of(generation.number, 70):
        commit(root, record)
    generation.close({})
    (key,) = [info.key for info in root.list("ledger") if info.key.endswith(".parquet")]
    root.put(key, root.read_bytes(key)[:-20])
    with pytest.raises(InputError, match=r"ledger/.*parquet cannot be read[\s\S]*delete this one object"):
        visible_records(root)
    root.delete(key)
    assert len(visible_records(root)) == 70


def test_a_store_that_fails_while_sealing_does_not_fail_a_finished_run(
    root: Root, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = claim(root)
    for record in records_of(generation.number, 70):
        commit(root, record)

    def refuse(*_: object) -> None:
        raise OSError("the store is full")

    monkeypatch.setattr("pipeline.store.ledger.generation.seal", refuse)
    generation.close({"status": "done"})
    assert "stay single objects until the next run" in caplog.text
    assert read_closing(root, generation.number) == {"status": "done"}
    assert len(visible_records(root)) == 70


def test_a_jobs_newest_generation_is_found_behind_those_of_others(tmp_path: Path) -> None:
    """What collects garbage or compacts afterwards says nothing of whether the run before it had ended."""
    root = planned_root(str(tmp_path / "d"), 1, 1)
    for job in ("sample", "gc", "sample", "gc", "compact"):
        claim_next(root, lambda previous: collect(root, previous), job=job).close({"status": "done"})
    assert [newest_of(root, job) for job in ("sample", "compact", "encode")] == [3, 5, 0]
    assert newest_of(root, "sample", before=3) == 1
