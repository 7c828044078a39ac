"""Verification finds every kind of damage, and compaction changes nothing that a reader can see."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import ConflictError, InputError
from pipeline.maintenance.config import VerifyJobConfig
from pipeline.maintenance.job import run_verify
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import claim_next, latest_number
from pipeline.store.ledger.identity import Identity, claim_identity
from pipeline.store.ledger.ledger import collect
from pipeline.store.ledger.state import read_state
from pipeline.store.maintain.compact import CompactReport, shard_spans
from pipeline.store.maintain.verify import verify
from pipeline.store.plan import DiffReport, append_version, read_plan
from pipeline.store.read.dataset import Dataset, LatentDataset
from pipeline.store.writer import ROW_BYTES, Committer
from tests.support.maintain import collect_garbage, compact
from tests.support.rows import Listed, claim, committer, latent_rows, planned_root, rejected_rows, sample_id

pytestmark = pytest.mark.integration

ROW = 48 + ROW_BYTES  # what is reckoned for a row of the bucket 24x32


def build(path: Path, seed: int, units: int = 6, rows: int = 10) -> Root:
    """A finished dataset whose fragments came in random order and random cuts."""
    root = planned_root(str(path), units, rows)
    chance = random.Random(seed)
    addresses = [(u, r) for u in range(units) for r in range(rows)]
    chance.shuffle(addresses)
    generation = claim(root)
    while addresses:
        cut = chance.randint(1, 9)
        part, addresses = sorted(addresses[:cut]), addresses[cut:]
        rejected = [a for a in part if a == (2, 3)]
        stored = [a for a in part if a != (2, 3)]
        wide = [a for a in stored if a[1] % 2]
        tall = [a for a in stored if not a[1] % 2]
        tables = [latent_rows(wide, "24x32"), latent_rows(tall, "32x24")]
        committer(root, generation).commit(pa.concat_tables(tables), rejected_rows(rejected, "truncated"), {})
    generation.close({"status": "done"})
    return root


def everything(uri: str) -> dict[bytes, bytes]:
    dataset = LatentDataset.open(uri)
    rows: dict[bytes, bytes] = {}
    for group in dataset.row_groups:
        table = dataset.read(group.index, ["sample_id", "latent", "bucket"])
        assert set(table["bucket"].to_pylist()) == {group.bucket}
        for name, data in zip(table["sample_id"].to_pylist(), table["latent"].to_pylist(), strict=True):
            assert name not in rows
            rows[name] = data
    return rows


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_a_sound_dataset_is_sound(tmp_path: Path) -> None:
    root = build(tmp_path / "d", seed=0)
    for level in ("ledger", "files", "checksums"):
        report = verify(root.uri, level)
        assert report.problems == []
        assert (report.planned_rows, report.stored_rows, report.rejected_rows) == (60, 59, 1)
    assert report.orphans == []


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    root = build(tmp_path / "d", seed=1)
    chance = random.Random(1)
    for info in [*root.list("data"), *root.list("rejects")]:
        path = root.local_path(info.key)
        assert path is not None
        for _ in range(3):
            position = chance.randrange(info.size_bytes)
            flip_bit(path, position)
            assert [p["where"] for p in verify(root.uri, "checksums").problems if p["kind"] == "checksum"] == [
                info.key
            ]
            flip_bit(path, position)
    assert verify(root.uri, "checksums").sound


def test_missing_short_and_orphan_files_are_found(tmp_path: Path) -> None:
    root = build(tmp_path / "d", seed=2)
    first, second, *_ = [root.local_path(i.key) for i in root.list("data")]
    assert first is not None
    assert second is not None
    left = [f"{place}/left-over.parquet" for place in ("data", "plan/parts", "rejects", "snapshots")]
    for name in left:
        root.put(name, b"what a crash left")
    first.unlink()
    os.truncate(second, 100)
    report = verify(root.uri, "files")
    assert {(p["kind"], Path(p["where"]).name) for p in report.problems} == {
        ("missing", first.name),
        ("size", second.name),
    }
    assert report.orphans == left


def test_an_unfinished_dataset_is_not_sound(tmp_path: Path) -> None:
    root = planned_root(str(tmp_path / "d"), 2, 5)
    committer(root, claim(root)).commit(latent_rows([(0, 0)]), None, {})
    (problem,) = verify(root.uri, "ledger").problems
    assert problem["kind"] == "unfinished"
    assert "9 rows" in problem["detail"]


def test_damage_to_plan_and_ledger_is_found(tmp_path: Path) -> None:
    root = build(tmp_path / "d", seed=3)
    record = root.local_path(next(iter(root.list("ledger"))).key)
    assert record is not None
    record.write_bytes(record.read_bytes().replace(b'"generation":1', b'"generation": 1'))
    assert [p["where"].rpartition("/")[2] for p in verify(root.uri, "files").problems] == [record.name]
    with pytest.raises(InputError, match="There is no dataset at"):
        verify(str(tmp_path / "nowhere"), "ledger")


def test_compaction_keeps_every_row_and_both_digests_tell(tmp_path: Path) -> None:
    root = build(tmp_path / "d", seed=4)
    before, rows = LatentDataset.open(root.uri), everything(root.uri)
    report = compact(root.uri, shard_bytes=20 * ROW, row_group_bytes=5 * 48)
    assert report.shards_written == 3
    after = LatentDataset.open(root.uri)
    assert everything(root.uri) == rows
    assert after.digest == before.digest
    assert after.layout_digest != before.layout_digest
    assert (after.channel_mean - before.channel_mean).max() < 1e-12
    assert verify(root.uri, "checksums").problems == []
    assert compact(root.uri, shard_bytes=20 * ROW, row_group_bytes=5 * 48).shards_written == 0


def test_compacted_shards_do_not_depend_on_scheduling(tmp_path: Path) -> None:
    one, two = build(tmp_path / "1", seed=5), build(tmp_path / "2", seed=6)
    for root in (one, two):
        compact(root.uri, shard_bytes=20 * ROW, row_group_bytes=5 * 48)
    names = [[g.file for g in LatentDataset.open(root.uri).row_groups] for root in (one, two)]
    assert names[0] == names[1]


def test_readers_work_before_during_and_after_compaction(tmp_path: Path) -> None:
    root = build(tmp_path / "d", seed=7)
    rows = everything(root.uri)
    old = LatentDataset.open(root.uri)
    stop, failures = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            if everything(root.uri) != rows:
                failures.append("a reader saw other rows")

    reader = threading.Thread(target=read)
    reader.start()
    compact(root.uri, shard_bytes=20 * ROW, row_group_bytes=5 * 48)
    stop.set()
    reader.join()
    assert failures == []
    # Who opened the dataset before goes on reading what was visible then.
    assert sum(len(old.read(g.index, ["unit"])) for g in old.row_groups) == 59


def test_a_partly_compacted_dataset_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash between two shards: some rows come from shards, the others from what is left of the fragments."""
    from pipeline.store.maintain import compact as module

    root = build(tmp_path / "d", seed=8)
    rows = everything(root.uri)
    real, calls = module._write_shard, []

    def crash(*args: object) -> tuple[int, int]:
        calls.append(args)
        if len(calls) == 2:
            raise OSError("the machine went away")
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_write_shard", crash)
    with pytest.raises(OSError, match="went away"):
        compact(root.uri, shard_bytes=20 * ROW, row_group_bytes=5 * 48)
    monkeypatch.setattr(module, "_write_shard", real)
    assert everything(root.uri) == rows
    assert verify(root.uri, "checksums").problems == []


def test_garbage_is_collected_only_after_its_grace(tmp_path: Path) -> None:
    root = build(tmp_path / "d", seed=9)
    rows = everything(root.uri)
    compact(root.uri, shard_bytes=20 * ROW, row_group_bytes=5 * 48)
    assert collect_garbage(root.uri, grace_s=3600) == (0, 0)
    removed, size = collect_garbage(root.uri, grace_s=0, now_s=2**33)
    assert removed > 3
    assert size > 0
    assert everything(root.uri) == rows
    report = verify(root.uri, "checksums")
    assert report.problems == []
    assert report.orphans == []


def test_what_a_killed_writer_left_half_written_is_garbage_too(tmp_path: Path) -> None:
    root = build(tmp_path / "d", seed=9)
    left, fresh = (tmp_path / "d/data" / f".tmp-{name}" for name in ("left", "fresh"))
    left.write_bytes(bytes(1000))
    fresh.write_bytes(bytes(10))
    os.utime(left, (time.time() - 7200,) * 2)
    assert set(verify(root.uri, "files").orphans) == {"data/.tmp-left", "data/.tmp-fresh"}
    assert collect_garbage(root.uri, grace_s=3600) == (1, 1000)
    assert (left.exists(), fresh.exists()) == (False, True)  # somebody may be writing this one


def test_bundles_stay_while_a_reader_may_still_follow_an_older_claim(tmp_path: Path) -> None:
    root = build(tmp_path / "d", seed=12)
    for _ in range(12):  # enough claims for their bundles to be merged
        compact(root.uri, **SIZES)
        retire(root, (0, len(read_plan(root).versions), len(read_plan(root).versions) + 1))
    rows = everything(root.uri)
    orphans = [key for key in verify(root.uri, "files").orphans if key.startswith("snapshots/")]
    assert len(orphans) >= 8
    now = time.time()
    for info in root.list("snapshots"):
        os.utime(str(root.local_path(info.key)), (now - 7200, now - 7200))
    # Superseded less than an hour ago, however old they are.
    collect_garbage(root.uri, grace_s=3600)
    assert {info.key for info in root.list("snapshots")} >= set(orphans)
    collect_garbage(root.uri, grace_s=0, now_s=2**33)
    assert not {info.key for info in root.list("snapshots")} & set(orphans)
    assert everything(root.uri) == rows
    report = verify(root.uri, "checksums")
    assert (report.problems, report.orphans) == ([], [])


def test_garbage_is_left_alone_while_a_run_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run finds in place it does not write again; it must still be there when its record names it."""
    root = build(tmp_path / "d", seed=13)
    root.put("data/left-over.parquet", b"what a crash left")
    run = claim_next(root, lambda previous: collect(root, previous), job="encode")
    try:
        told = VerifyJobConfig.model_validate(
            {"data": {"uri": root.uri}, "gc": True, "gc_grace_s": 0, "tracking": {"enabled": False}}
        )
        with pytest.raises(ConflictError, match="Another run is writing") as caught:
            monkeypatch.setattr("time.time", lambda: 2.0**33)
            run_verify(told)
        assert caught.value.result is not None
        assert caught.value.result.counts["planned"] == 60
        assert root.exists("data/left-over.parquet")
        run.close({"status": "done"})
        assert collect_garbage(root.uri, grace_s=0, now_s=2**33)[0] >= 1
        assert not root.exists("data/left-over.parquet")
    finally:
        run.abandon()


def test_a_run_that_takes_over_stops_garbage_collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process was suspended, say: what the new run has found in place must stay."""
    root = build(tmp_path / "d", seed=14)
    left = [f"data/left-over-{number}.parquet" for number in range(100)]
    for name in left:
        root.put(name, b"what a crash left")
    deleted: list[str] = []
    real = Root.delete

    def delete(self: Root, key: str) -> None:
        deleted.append(key)
        if len(deleted) == 1:
            claim = {"job": "encode", "owner": {}, "bundles": collect(root, latest_number(root)), "at": time.time()}
            root.put(f"generations/{latest_number(root) + 1:08d}/open.json", json.dumps(claim).encode())
        real(self, key)

    monkeypatch.setattr(Root, "delete", delete)
    with pytest.raises(ConflictError, match="Another run has taken over"):
        collect_garbage(root.uri, grace_s=0, now_s=2**33)
    assert 0 < len(deleted) < len(left)


def test_a_plan_is_not_extended_by_a_run_that_was_fenced_off(tmp_path: Path) -> None:
    """The parts it has written may be garbage by then."""
    root = build(tmp_path / "d", seed=15)
    plan, old = read_plan(root), latest_number(root)
    compact(root.uri, **SIZES)
    with pytest.raises(ConflictError, match="Another run has taken over"):
        append_version(plan, [], report=DiffReport(retired=[(0, 0, 1)]), source={}, generation=old)
    assert read_plan(root) == plan


def retire(root: Root, *triples: tuple[int, int, int]) -> None:
    """What planning does with rows whose source has changed or gone."""
    report = DiffReport(retired=list(triples))
    append_version(read_plan(root), [], report=report, source={}, generation=latest_number(root))


SIZES = {"shard_bytes": 20 * ROW, "row_group_bytes": 5 * 48}


def test_compaction_after_rows_were_retired_comes_to_an_end(tmp_path: Path) -> None:
    """Rows retired once are moved out of their shard once; a file of none but retired rows is garbage."""
    root = build(tmp_path / "d", seed=10)
    compact(root.uri, **SIZES)
    collect_garbage(root.uri, grace_s=0, now_s=2**33)
    rows, shards = everything(root.uri), sorted(i.key for i in root.list("data"))
    assert len(shards) == 3
    # A row of the first shard, all rows of the last one, a rejected row, and the reject file with it.
    retire(root, (0, 4, 5), (4, 0, 10), (5, 0, 1 << 31), (2, 3, 4))
    dead = {sample_id(u, r) for u, r in [(0, 4), *((u, r) for u in (4, 5) for r in range(10))]}
    left = {name: data for name, data in rows.items() if name not in dead}
    assert everything(root.uri) == left
    report = verify(root.uri, "checksums")
    assert (report.problems, report.stored_rows, report.planned_rows) == ([], 38, 38)
    assert len(report.orphans) == 2
    assert [key.partition("/")[0] for key in report.orphans] == ["data", "rejects"]
    assert compact(root.uri, **SIZES).shards_written == 1
    assert compact(root.uri, **SIZES) == CompactReport(0, 3, 0, 0)
    dataset = LatentDataset.open(root.uri)
    assert not dataset.row_groups.partial.any()
    # Beside files a bundle, whose records the next one holds as far as they count.
    orphans = [key.partition("/")[0] for key in verify(root.uri, "files").orphans]
    assert orphans == ["data", "data", "rejects", "snapshots"]
    collect_garbage(root.uri, grace_s=0, now_s=2**33)
    assert len(list(root.list("data"))) == 2
    assert everything(root.uri) == left
    assert verify(root.uri, "checksums").problems == []


def test_a_unit_larger_than_a_shard_is_cut_at_a_row(tmp_path: Path) -> None:
    root = build(tmp_path / "d", seed=11, units=3, rows=40)
    rows = everything(root.uri)
    assert compact(root.uri, **SIZES).shards_written == 6
    assert compact(root.uri, **SIZES) == CompactReport(0, 6, 0, 0)
    dataset = LatentDataset.open(root.uri)
    held: dict[str, set[tuple[int, int]]] = {}
    for group in dataset.row_groups:
        table = dataset.read(group.index, ["unit", "row"])
        held.setdefault(group.file, set()).update(
            zip(table["unit"].to_pylist(), table["row"].to_pylist(), strict=True)
        )
    assert sorted(map(len, held.values())) == [19, 20, 20, 20, 20, 20]
    for addresses in held.values():
        assert max(addresses)[0] == min(addresses)[0]
        assert max(addresses)[1] - min(addresses)[1] == 19
    assert everything(root.uri) == rows
    assert verify(root.uri, "checksums").problems == []


@pytest.mark.parametrize("done", range(4))
def test_a_kill_between_the_parts_of_a_unit_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """What a killed compaction has written stands, and the next one ends in the very shards of an undisturbed one."""
    from pipeline.store.maintain import compact as module

    root, undisturbed = (build(tmp_path / name, seed=12, units=2, rows=40) for name in ("killed", "whole"))
    compact(undisturbed.uri, **SIZES)
    real, calls = module._write_shard, []

    def crash(*args: object) -> tuple[int, int]:
        calls.append(args)
        if len(calls) > done:
            raise OSError("the machine went away")
        return real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_shard", crash)
        with pytest.raises(OSError, match="went away"):
            compact(root.uri, **SIZES)
    assert everything(root.uri) == everything(undisturbed.uri)
    # Here the process that was "killed" lives on, and would be waited for.
    monkeypatch.setattr("pipeline.store.ledger.generation._known_dead", lambda owner: True)
    report = compact(root.uri, **SIZES)
    assert (report.shards_written, report.shards_kept) == (4 - done, done)
    assert layout_of(root) == layout_of(undisturbed)
    assert verify(root.uri, "checksums").problems == []


def layout_of(root: Root) -> list[tuple[str, int]]:
    """Bucket and rows of every row group in order."""
    return [(g.bucket, g.num_rows) for g in LatentDataset.open(root.uri).row_groups]


def test_repeated_writes_do_not_move_the_ends_of_shards(tmp_path: Path) -> None:
    """A write that was repeated with other rows leaves dead rows; they do not count for the mean size of a row."""
    ends = []
    for repeats in (0, 4):
        root = planned_root(str(tmp_path / str(repeats)), 8, 5)
        writer = committer(root, claim(root))
        for unit in range(8):
            writer.commit(latent_rows([(unit, r) for r in range(5)], "24x64" if unit == 0 else "24x32"), None, {})
        for row in range(repeats):
            committer(root, claim(root)).commit(latent_rows([(0, row)], "24x64"), None, {})
        dataset = LatentDataset.open(root.uri)
        assert dataset.num_rows == 40
        ends.append(list(shard_spans(dataset, 16 * (ROW + 8))))
    assert ends[0] == ends[1]
    assert len(ends[0]) == 3


def test_rows_of_another_size_that_come_later_leave_the_shards_alone(tmp_path: Path) -> None:
    root = planned_root(str(tmp_path / "d"), 20, 5)
    generation = claim(root)
    for unit in range(20):
        committer(root, generation).commit(latent_rows([(unit, r) for r in range(5)]), None, {})
    generation.close({"status": "done"})
    assert compact(root.uri, shard_bytes=21 * ROW, row_group_bytes=5 * ROW).shards_written == 5
    generation = claim(root)
    entries = [[Listed(f"{u}/{r}") for r in range(5)] for u in (20, 21)]
    append_version(read_plan(root), entries, source={"uri": "mem"}, generation=generation.number)
    for unit in (20, 21):
        committer(root, generation).commit(latent_rows([(unit, r) for r in range(5)], "24x64"), None, {})
    generation.close({"status": "done"})
    report = compact(root.uri, shard_bytes=21 * ROW, row_group_bytes=5 * ROW)
    assert (report.shards_written, report.shards_kept) == (1, 5)


def test_filtered_rows_take_no_room_in_a_shard(tmp_path: Path) -> None:
    root = planned_root(str(tmp_path / "d"), 8, 10)
    generation = claim(root)
    for unit in range(8):
        left_out = rejected_rows([(unit, r) for r in range(1, 10)], "min_side", "filtered")
        committer(root, generation).commit(latent_rows([(unit, 0)]), left_out, {})
    spans = list(shard_spans(LatentDataset.open(root.uri), 4 * ROW))
    assert len(spans) == 2


def test_rows_whose_blobs_lie_elsewhere_make_shards_too(tmp_path: Path) -> None:
    """As where pictures are files of their own: the rows are what is left to be cut into shards."""
    root = Root(str(tmp_path / "d"))
    identity = Identity("images", {"model": "none"}, {})
    claim_identity(root, identity)
    entries = [[Listed(f"{u}", row_stop=40_000)] for u in range(3)]
    append_version(read_plan(root), entries, source={"uri": "mem"}, generation=0)
    generation = claim(root)
    for unit in range(3):
        columns = {"unit": np.full(40_000, unit), "row": np.arange(40_000), "variant": np.zeros(40_000, np.int32)}
        table = pa.table(columns | {"bucket": ["8x8"] * 40_000, "image": [b""] * 40_000})
        Committer(root, generation.number, 1 << 20, None, {}).commit(table, None, {})
    dataset = Dataset(root, identity, read_state(root))
    assert len(list(shard_spans(dataset, 384 << 20))) == 3
