"""Shuffled compaction: rows from everywhere in every shard, none lost, nothing twice, and what is there stays."""

from __future__ import annotations

import random
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataflow.workers import in_threads
from pipeline.errors import InputError
from pipeline.storage.root import Root
from pipeline.store.ledger.ledger import claimed
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.maintain import compact as module
from pipeline.store.maintain.compact import CompactReport, RowSource, shards_to_write
from pipeline.store.maintain.verify import verify
from pipeline.store.plan import append_version, read_plan
from pipeline.store.read.dataset import Dataset, LatentDataset
from pipeline.store.read.pages import StoredParts
from pipeline.store.schema import LATENTS
from pipeline.store.writer import ROW_BYTES
from tests.support.maintain import collect_garbage, compact
from tests.support.rows import (
    Listed,
    claim,
    committer,
    latent_rows,
    may_be_null,
    planned_root,
    rejected_rows,
    sample_id,
)

pytestmark = pytest.mark.integration

ROW = 48 + ROW_BYTES  # what is reckoned for a row of the bucket 24x32
SIZES = {"shard_bytes": 130 * ROW, "row_group_bytes": 32 * ROW}


def add(root: Root, units: range, rows: int, seed: int = 0) -> None:
    """Commit planned units, one class each, in fragments that were cut at random; one row in each is rejected.

    Every other file is as encode once wrote them.
    """
    chance, generation = random.Random(seed), claim(root)
    addresses = [(unit, row) for unit in units for row in range(rows)]
    for written in cycle([pa.Table.combine_chunks, may_be_null]):
        if not addresses:
            break
        cut = chance.randint(rows // 2, 3 * rows)
        part, addresses = addresses[:cut], addresses[cut:]
        tables = [latent_rows([a for a in part if a[0] == u and a[1]], label=u) for u in {u for u, _ in part}]
        rejected = [a for a in part if not a[1]]
        outcomes = rejected_rows(rejected, "truncated") if rejected else None
        committer(root, generation, row_group_bytes=20 * ROW).commit(written(pa.concat_tables(tables)), outcomes, {})
    generation.close({"status": "done"})


def grow(root: Root, units: int, rows: int) -> None:
    """One more version of the plan, of so many units, encoded."""
    first, generation = read_plan(root).next_unit, claim(root)
    entries = [[Listed(f"{first + u}/{r}") for r in range(rows)] for u in range(units)]
    append_version(read_plan(root), entries, source={"uri": "mem"}, generation=generation.number)
    generation.close({"status": "done"})
    add(root, range(first, first + units), rows)


def sorted_by_class(path: Path, units: int = 32, rows: int = 41, seed: int = 0) -> Root:
    root = planned_root(str(path), units, rows)
    add(root, range(units), rows, seed)
    return root


def everything(uri: str) -> dict[bytes, tuple[bytes, int, str]]:
    dataset, rows = LatentDataset.open(uri), {}
    for group in range(len(dataset.row_groups)):
        for row in dataset.read(group, ["sample_id", "latent", "label", "caption"]).to_pylist():
            assert row["sample_id"] not in rows
            rows[row["sample_id"]] = (row["latent"], row["label"], row["caption"])
    return rows


def layout_of(root: Root) -> list[bytes]:
    """The ids of all rows in the order of shards, whose names tell their generation."""
    dataset = LatentDataset.open(root.uri)
    shards: dict[str, list[bytes]] = {}
    for group in dataset.row_groups:
        shards.setdefault(group.file, []).extend(dataset.read(group.index, ["sample_id"])["sample_id"].to_pylist())
    return sorted(b"".join(ids) for ids in shards.values())


def test_every_row_stays_the_digest_too_and_a_second_call_does_nothing(tmp_path: Path) -> None:
    root = sorted_by_class(tmp_path / "d")
    before, rows = LatentDataset.open(root.uri), everything(root.uri)
    assert len(rows) == 32 * 40
    report = compact(root.uri, seed=0, **SIZES)
    assert report.shards_written == 11
    assert report.rows_moved == 32 * 40
    after = LatentDataset.open(root.uri)
    assert everything(root.uri) == rows
    assert after.digest == before.digest
    assert after.layout_digest != before.layout_digest
    schemas = [pq.read_schema(Path(root.uri) / group.file) for group in after.row_groups]
    assert all(schema.equals(LATENTS) for schema in schemas), "columns are as they are declared"
    assert np.allclose(after.channel_mean, before.channel_mean, rtol=0, atol=1e-12)
    assert not after.row_groups.partial.any()
    assert verify(root.uri, "checksums").sound
    assert compact(root.uri, seed=0, **SIZES) == CompactReport(0, 11, 0, 0)
    assert (before.is_shuffled, after.is_shuffled) == (False, True)
    collect_garbage(root.uri, grace_s=0, now_s=2**33)
    assert everything(root.uri) == rows
    assert verify(root.uri, "checksums").orphans == []


def test_a_shard_and_each_of_its_row_groups_hold_classes_from_everywhere(tmp_path: Path) -> None:
    """Of 32 classes, 117 independent draws hold 31, 32 draws hold 20; in plan order it would be 3 and 1 or 2."""
    root = sorted_by_class(tmp_path / "d")

    def classes() -> tuple[float, float]:
        dataset = LatentDataset.open(root.uri)
        of_file: dict[str, set[int]] = {}
        of_group = []
        for group in dataset.row_groups:
            labels = set(dataset.read(group.index, ["label"])["label"].to_pylist())
            of_file.setdefault(group.file, set()).update(labels)
            of_group += [len(labels)] if group.num_rows == 32 else []
        return float(np.mean([len(each) for each in of_file.values()])), float(np.mean(of_group))

    compact(root.uri, seed=None, **SIZES)
    assert classes()[0] < 5
    compact(root.uri, seed=5, **SIZES)
    of_file, of_group = classes()
    assert of_file > 30
    assert of_group > 18


def test_shards_do_not_depend_on_scheduling_but_on_the_seed(tmp_path: Path) -> None:
    one, two = (sorted_by_class(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    assert [f.info.path for f in LatentDataset.open(one.uri).state.files] != [
        f.info.path for f in LatentDataset.open(two.uri).state.files
    ]
    for root, workers in ((one, 1), (two, 3)):
        compact(root.uri, seed=7, spread=partial(in_threads, workers), **SIZES)
    names = [sorted(f.info.path for f in LatentDataset.open(root.uri).state.files) for root in (one, two)]
    assert names[0] == names[1]
    shuffled = layout_of(one)
    assert compact(one.uri, seed=8, **SIZES).shards_kept == 0
    assert layout_of(one) != shuffled
    assert compact(one.uri, seed=7, **SIZES).shards_written == 11
    assert layout_of(one) == shuffled
    # And back: the rows of a shard of another order may be the same, their order is not.
    assert compact(one.uri, seed=None, **SIZES).shards_kept == 0
    assert compact(one.uri, seed=None, **SIZES).shards_written == 0


def test_a_dataset_of_one_shard_is_shuffled_too(tmp_path: Path) -> None:
    root = planned_root(str(tmp_path / "d"), 4, 10)
    generation = claim(root)
    committer(root, generation).commit(latent_rows([(u, r) for u in range(4) for r in range(10)]), None, {})
    generation.close({"status": "done"})

    def ids() -> list[bytes]:
        dataset = LatentDataset.open(root.uri)
        groups = range(len(dataset.row_groups))
        return [name for group in groups for name in dataset.read(group, ["sample_id"])["sample_id"].to_pylist()]

    inside = [sample_id(u, r) for u in range(4) for r in range(10)]
    assert ids() == inside
    assert compact(root.uri, seed=0, **SIZES).shards_written == 1
    mixed = ids()
    assert mixed != inside
    assert sorted(mixed) == sorted(inside)
    assert compact(root.uri, seed=0, **SIZES).shards_written == 0


@pytest.mark.parametrize("done", [0, 1, 5, 10])
def test_what_a_killed_compaction_has_written_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    root, undisturbed = (sorted_by_class(tmp_path / name) for name in ("killed", "whole"))
    compact(undisturbed.uri, seed=3, **SIZES)
    real, calls = module._write_shard, []

    def crash(*args: object) -> tuple[int, int]:
        calls.append(args)
        if len(calls) > done:
            raise OSError("the machine went away")
        return real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_shard", crash)
        with pytest.raises(OSError, match="went away"):
            compact(root.uri, seed=3, **SIZES)
    assert everything(root.uri) == everything(undisturbed.uri)
    assert verify(root.uri, "checksums").sound
    # Here the process that was "killed" lives on, and would be waited for.
    monkeypatch.setattr("pipeline.store.ledger.generation._known_dead", lambda owner: True)
    report = compact(root.uri, seed=3, **SIZES)
    assert (report.shards_written, report.shards_kept) == (11 - done, done)
    assert layout_of(root) == layout_of(undisturbed)
    assert verify(root.uri, "checksums").sound


def test_what_is_added_is_mixed_among_itself_and_full_pools_stay(tmp_path: Path) -> None:
    root = sorted_by_class(tmp_path / "d")

    def night(units: int) -> CompactReport:
        grow(root, units, 41)
        return compact(root.uri, seed=0, **SIZES)

    compact(root.uri, seed=0, **SIZES)
    first = {f.info.path for f in LatentDataset.open(root.uri).state.files}
    # Less than a shard of 128 rows: one of its own, made anew until it is full; then the next begins.
    for rows, shards in ((40, 1), (80, 1), (120, 1), (160, 2)):
        report = night(1)
        assert (report.shards_written, report.shards_kept, report.rows_moved) == (shards, 11, rows)
    full = {f.info.path for f in LatentDataset.open(root.uri).state.files}
    assert first < full
    grow(root, 9, 41)
    assert not LatentDataset.open(root.uri).is_shuffled
    report = compact(root.uri, seed=0, **SIZES)
    assert LatentDataset.open(root.uri).is_shuffled
    assert (report.shards_written, report.shards_kept, report.rows_moved) == (3, 13, 360)
    dataset = LatentDataset.open(root.uri)
    assert full < {f.info.path for f in dataset.state.files}
    new = [g for g in dataset.row_groups if g.file not in full]
    assert all(min(dataset.read(g.index, ["label"])["label"].to_pylist()) >= 36 for g in new)
    labels = [len(set(dataset.read(g.index, ["label"])["label"].to_pylist())) for g in new]
    assert max(labels) == 9
    assert verify(root.uri, "checksums").sound


@settings(deadline=None, max_examples=40)
@given(
    versions=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=6), min_size=1, max_size=4),
    per_shard=st.sampled_from([1, 8, 40, 1000]),
    seed=st.integers(0, 2**60),
)
def test_the_shards_are_a_partition_of_the_plan(
    tmp_path_factory: pytest.TempPathFactory, versions: list[list[int]], per_shard: int, seed: int
) -> None:
    root = planned_root(str(tmp_path_factory.mktemp("d") / "d"), 0, 0)
    total = 0
    for number, lengths in enumerate(versions):
        entries = [[Listed(f"{number}/{unit}", row_stop=length)] for unit, length in enumerate(lengths)]
        append_version(read_plan(root), entries, source={"uri": "mem"}, generation=0)
        total += sum(lengths)
    dataset = LatentDataset.open(root.uri)
    shards = module._shuffled(dataset, per_shard, seed)
    rows = [shards.rows(number) for number in range(len(shards))]
    assert np.array_equal(shards.starts[1:], shards.stops[:-1])
    units, lengths = dataset.state.plan.unit_lengths()
    planned = RowSet.from_arrays(units, np.zeros_like(units), lengths)
    counts = [(each & planned).count() for each in rows]
    assert sum(counts) == total
    assert RowSet.union_all(rows) & planned == planned
    assert max(counts) <= per_shard + module._STRETCHES  # parts differ by a row


def test_a_latent_is_read_twice_and_not_once_for_each_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = sorted_by_class(tmp_path / "d")
    whole: list[int] = []
    parts: list[int] = []
    read, copy = Dataset.read, StoredParts.copy

    def counted(self: Dataset, group: int, columns: list[str] | None, **options: bool) -> object:
        if columns is None or "latent" in columns:
            whole.append(self.row_groups[group].num_rows)
        return read(self, group, columns, **options)

    def copied(self: StoredParts, places: object) -> object:
        parts.append(len(places))  # type: ignore[arg-type]
        return copy(self, places)  # type: ignore[arg-type]

    monkeypatch.setattr(Dataset, "read", counted)
    monkeypatch.setattr(StoredParts, "copy", copied)
    compact(root.uri, seed=0, **SIZES)
    assert sum(whole) == 32 * 40
    # The first part of a row group is what was just read.
    assert 0 < sum(parts) <= 32 * 40 - len(whole)


def test_damage_is_noticed_before_it_is_moved(tmp_path: Path) -> None:
    root = sorted_by_class(tmp_path / "d")
    dataset = LatentDataset.open(root.uri)
    path = root.local_path(dataset.row_groups[5].file)
    assert path is not None
    data = bytearray(path.read_bytes())
    at = data.index(dataset.read(5, ["latent"])["latent"][3].as_py())
    data[at] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"(?i)crc|checksum"):
        compact(root.uri, seed=0, **SIZES)


def test_a_claim_that_notes_another_order_is_refused(tmp_path: Path) -> None:
    root = sorted_by_class(tmp_path / "d", units=4)
    with claimed(root, "compact", patience_s=0.0) as generation:
        with pytest.raises(ValueError, match="notes 'units' where 'shuffled 0' is to be written"):
            module.compact(generation, seed=0, **SIZES)


def test_rows_of_any_addresses_are_read_from_any_layout(tmp_path: Path) -> None:
    root = sorted_by_class(tmp_path / "d", units=6)
    chance = np.random.default_rng(0)
    for seed in (None, 0):
        compact(root.uri, seed=seed, **SIZES)
        dataset = LatentDataset.open(root.uri)
        source = RowSource(dataset)
        for share in (0.02, 0.5, 1.0):
            units, rows = np.divmod(np.flatnonzero(chance.random(6 * 41) < share), 41)
            found = source.read(RowSet.from_rows(units, rows))
            wanted = {sample_id(u, r) for u, r in zip(units.tolist(), rows.tolist(), strict=True) if r}
            assert found is not None
            assert set(found["sample_id"].to_pylist()) == wanted
            known = everything(root.uri)
            for row in found.to_pylist():
                assert known[row["sample_id"]] == (row["latent"], row["label"], row["caption"])
        assert source.read(RowSet.from_rows(np.array([3]), np.array([0]))) is None
    assert shards_to_write(LatentDataset.open(root.uri), SIZES["shard_bytes"], 0)[1] == []
