"""A pinned state is what it was, whatever becomes of the dataset; what cannot be read as one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import ConflictError, InputError
from pipeline.storage.root import Root
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.ledger.state import read_state
from pipeline.store.plan import DiffReport, append_version, read_plan
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.read.pins import Pins, lost_files
from tests.support.maintain import compact
from tests.support.rows import Listed, claim, committer, latent_rows, planned_root, rejected_rows


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """Three units; of the second a row is rejected and two are open, the third is open."""
    root = planned_root(str(tmp_path / "data"), units=3, rows=5)
    generation = claim(root)
    writer = committer(root, generation, row_group_bytes=200)
    writer.commit(latent_rows([(0, r) for r in range(5)]), None, {})
    writer.commit(latent_rows([(1, 0), (1, 1)]), rejected_rows([(1, 2)], "truncated"), {})
    generation.abandon()
    return root


@pytest.fixture
def pins(tmp_path: Path) -> Pins:
    return Pins(Root(str(tmp_path / "run")), "inputs")


def change(root: Root) -> None:
    """What was open is encoded, the reject settled anew, a row retired, a version added, all compacted."""
    generation = claim(root)
    committer(root, generation).commit(latent_rows([(1, 2), (1, 3), (1, 4), *((2, r) for r in range(5))]), None, {})
    report = DiffReport()
    report.retire(0, 3, 4)
    new = [[Listed("new")]]
    append_version(read_plan(root), new, report=report, source={"uri": "mem"}, generation=generation.number)
    committer(root, generation).commit(latent_rows([(3, 0)]), None, {})
    generation.close({"status": "done"})
    compact(root.uri, shard_bytes=10 * 304, row_group_bytes=5 * 48)


def contents(dataset: LatentDataset) -> list[dict[str, object]]:
    return [row for g in dataset.row_groups for row in dataset.read(g.index, None).to_pylist()]


def test_a_pinned_dataset_stays_what_it_was(root: Root, pins: Pins) -> None:
    before = LatentDataset.open(root.uri)
    rows = contents(before)
    pins.pin(root)
    change(root)
    kept = LatentDataset.open(root.uri, pins=pins)
    assert (kept.digest, kept.layout_digest) == (before.digest, before.layout_digest)
    assert contents(kept) == rows
    assert kept.state.rejects == {"truncated": RowSet.from_triples([(1, 2, 3)])}
    assert kept.state.gaps() == before.state.gaps()
    now = LatentDataset.open(root.uri)
    assert now.digest != kept.digest
    assert now.num_rows == 15


def test_what_was_published_of_a_pinned_dataset_spares_its_readers_the_ledger(root: Root, pins: Pins) -> None:
    before = LatentDataset.open(root.uri)
    rows, moments = contents(before), (before.channel_mean.tolist(), before.channel_std.tolist())
    pins.pin(root)
    change(root)
    kept = LatentDataset.open(root.uri, pins=pins)
    kept.publish(pins)
    kept.publish(pins)  # once is enough
    run = Root(str(Path(root.uri).parent / "run"))
    for key in [info.key for info in run.list("inputs") if info.key.endswith(".parquet")]:
        run.delete(key)  # the ledger, as it was kept
    reader = LatentDataset.open(root.uri, pins=pins)
    assert (reader.digest, reader.layout_digest) == (before.digest, before.layout_digest)
    assert contents(reader) == rows
    assert (reader.channel_mean.tolist(), reader.channel_std.tolist()) == moments
    assert list(reader.row_groups) == list(before.row_groups)
    with pytest.raises(InputError, match="is gone"):
        _ = reader.state
    (key,) = [info.key for info in run.list("inputs") if info.key.endswith(".arrow")]
    run.put(key, run.read_bytes(key)[:200])
    with pytest.raises(InputError, match=r"arrow cannot be read[\s\S]*delete this one object"):
        LatentDataset.open(root.uri, pins=pins)


def test_of_rows_that_died_before_it_was_pinned_a_reader_sees_none(root: Root, pins: Pins) -> None:
    report = DiffReport()
    report.retire(0, 1, 2)
    generation = claim(root)
    append_version(read_plan(root), [[Listed("new")]], report=report, source={}, generation=generation.number)
    before = LatentDataset.open(root.uri)
    assert before.row_groups.partial.any()
    pins.pin(root)
    LatentDataset.open(root.uri, pins=pins).publish(pins)
    reader = LatentDataset.open(root.uri, pins=pins)
    assert contents(reader) == contents(before)
    assert [row for row in contents(reader) if (row["unit"], row["row"]) == (0, 1)] == []


def test_what_is_not_pinned_is_what_is_visible(root: Root, pins: Pins) -> None:
    assert pins.state(root) is None
    assert LatentDataset.open(root.uri, pins=pins).num_rows == 7


def test_what_is_kept_is_not_replaced(root: Root, pins: Pins) -> None:
    assert not pins.holds(root)
    pins.pin(root)
    change(root)
    pins.pin(root)
    assert pins.holds(root)
    assert LatentDataset.open(root.uri, pins=pins).num_rows == 7


def test_two_datasets_are_kept_apart(root: Root, pins: Pins, tmp_path: Path) -> None:
    other = planned_root(str(tmp_path / "other"), units=1, rows=1)
    pins.pin(root)
    pins.pin(other)
    assert LatentDataset.open(root.uri, pins=pins).num_rows == 7
    assert LatentDataset.open(other.uri, pins=pins).num_rows == 0


def test_another_dataset_at_the_same_place_is_refused(root: Root, pins: Pins) -> None:
    pins.pin(root)
    for info in root.list():
        root.delete(info.key)
    planned_root(root.uri, units=2, rows=7)
    with pytest.raises(ConflictError, match="its plan begins with other units"):
        LatentDataset.open(root.uri, pins=pins)


def test_files_that_are_gone_are_named(root: Root, pins: Pins) -> None:
    pins.pin(root)
    kept = pins.state(root)
    assert kept is not None
    assert lost_files(root, kept, read_state(root)) == []
    change(root)
    assert lost_files(root, kept, read_state(root)) == []
    visible = {file.info.path for file in read_state(root).files}
    replaced = sorted({file.info.path for file in kept.files} - visible)
    assert replaced
    for path in replaced:
        root.delete(path)
    assert lost_files(root, kept, read_state(root)) == replaced


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"bundle": "elsewhere/x.parquet"},
        {"bundle": "inputs/../secret.parquet"},
        {"bundle": 7},
        {"plan": "v1"},
        {"headers": ["plan/../../secret.json"]},
        {"headers": ["dataset.json"]},
        {"headers": 7},
    ],
)
def test_a_pin_that_was_changed_is_refused(root: Root, pins: Pins, tmp_path: Path, change: dict[str, object]) -> None:
    pins.pin(root)
    (header,) = (tmp_path / "run" / "inputs").glob("*.json")
    header.write_text(json.dumps(json.loads(header.read_bytes()) | change))
    with pytest.raises(InputError, match=f"{header.name} cannot be read"):
        pins.state(root)


def test_a_damaged_bundle_is_refused(root: Root, pins: Pins, tmp_path: Path) -> None:
    pins.pin(root)
    (bundle,) = (tmp_path / "run" / "inputs").glob("*.parquet")
    bundle.write_bytes(bundle.read_bytes()[:-20])
    with pytest.raises(InputError, match=f"{bundle.name} cannot be read"):
        pins.state(root)
