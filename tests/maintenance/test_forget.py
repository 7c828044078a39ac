"""What is withdrawn leaves, with all of equal content, stays away, and those whose training saw it are named."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.encode.plan import group_units
from pipeline.encode.stages import UnitReader
from pipeline.errors import InputError
from pipeline.maintenance.config import ForgetListConfig
from pipeline.maintenance.job import read_list
from pipeline.source.config import FolderSource
from pipeline.source.reading.listing import list_entries
from pipeline.source.reading.rows import sample_id
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import note_run
from pipeline.store.ledger.ledger import claimed
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.ledger.state import read_state
from pipeline.store.maintain.forget import ForgetReport, Listed, Withdrawals, _NearHashes, forget
from pipeline.store.maintain.verify import verify
from pipeline.store.plan import Work, append_version, read_plan
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.schema import LATENTS
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.tracker import open_tracker
from tests.support.jobs import run
from tests.support.maintain import collect_garbage, compact
from tests.support.rows import claim, committer, latent_rows, planned_root

UNITS, ROWS = 3, 5
EVERYTHING = [(u, r) for u in range(UNITS) for r in range(ROWS)]

T = TypeVar("T")
R = TypeVar("R")


def content(unit: int, row: int) -> bytes:
    """Of the first and the last row the same, else each its own."""
    return hashlib.sha256(b"twice" if (unit, row) in ((0, 0), (2, 4)) else b"%d %d" % (unit, row)).digest()


def phash(unit: int, row: int) -> int:
    return (unit * 1000 + row) << 20


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """Three units of five rows, whose keys are `u0/r0.png` and so on, in two commits a unit."""
    root = planned_root(str(tmp_path / "data"), units=UNITS, rows=ROWS)
    generation = claim(root)
    for unit in range(UNITS):
        for rows in ((0, 1, 2), (3, 4)):
            table = latent_rows([(unit, row) for row in rows])
            columns = {
                "sample_id": pa.array([sample_id("source", f"u{unit}/r{row}.png") for row in rows], pa.binary(16)),
                "content_sha256": pa.array([content(unit, row) for row in rows], pa.binary(32)),
                "phash": pa.array([phash(unit, row) for row in rows], pa.uint64()),
            }
            for name, values in columns.items():
                table = table.set_column(table.schema.get_field_index(name), LATENTS.field(name), values)
            committer(root, generation, row_group_bytes=100).commit(table, None, {})
    generation.close({"status": "done"})
    return root


def withdraw(root: Root, listed: Listed, **settings: Any) -> ForgetReport:
    with claimed(root, "forget", patience_s=0.0) as generation:
        return forget(generation, listed, source_uri="mem", **settings)


def elsewhere_backwards(make: Callable[[], Callable[[T], R]], items: Iterable[T]) -> Iterator[R]:
    """As other processes do it, the last item first: all of it travels."""
    function = pickle.loads(pickle.dumps(make))()
    for item in reversed(list(items)):
        yield pickle.loads(pickle.dumps(function(item)))


def stored(root: Root) -> list[tuple[int, int]]:
    dataset = LatentDataset.open(root.uri)
    tables = [dataset.read(g.index, ["unit", "row"]) for g in dataset.row_groups]
    return sorted(pair for t in tables for pair in zip(t["unit"].to_pylist(), t["row"].to_pylist(), strict=True))


def without(*gone: tuple[int, int]) -> list[tuple[int, int]]:
    return [pair for pair in EVERYTHING if pair not in gone]


@pytest.mark.parametrize(
    ("listed", "gone"),
    [
        (Listed(ids=frozenset({sample_id("source", "u1/r2.png")})), [(1, 2)]),
        (Listed(contents=frozenset({content(1, 3)})), [(1, 3)]),
        (Listed(phashes=frozenset({phash(1, 4) ^ 0b101}), phash_distance=2), [(1, 4)]),
        # Of equal content under another name nothing is left either, whichever way one was named.
        (Listed(ids=frozenset({sample_id("source", "u0/r0.png")})), [(0, 0), (2, 4)]),
        (Listed(phashes=frozenset({phash(2, 4)})), [(0, 0), (2, 4)]),
    ],
)
def test_rows_that_are_named_leave_with_all_of_equal_content(
    root: Root, listed: Listed, gone: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.store.maintain.forget._ROWS_PER_PIECE", 4)
    assert withdraw(root, listed, spread=elsewhere_backwards) == ForgetReport(len(gone), 0, True, gone[0][0])
    assert stored(root) == without(*gone)
    assert read_state(root).filtered == {"withdrawn": RowSet.from_triples([(u, r, r + 1) for u, r in gone])}
    assert not read_state(root).gaps()
    assert verify(root.uri, "checksums").problems == []
    known = Withdrawals.read(root, Withdrawals.keys(root))
    assert known.holds(sample_id("other", "x"), b"twice") == ((0, 0) in gone)
    assert withdraw(root, listed) == ForgetReport(0, listed.count(), False, None), "once is enough"
    assert len(Withdrawals.keys(root)) == 1
    assert stored(root) == without(*gone)


def test_after_the_next_compaction_and_collection_no_byte_of_them_is_left(root: Root) -> None:
    latents = {tuple(pair): None for pair in EVERYTHING}
    dataset = LatentDataset.open(root.uri)
    for group in dataset.row_groups:
        table = dataset.read(group.index, ["unit", "row", "latent", "caption"])
        latents |= {(r["unit"], r["row"]): (r["latent"], r["caption"].encode()) for r in table.to_pylist()}
    withdraw(root, Listed(contents=frozenset({content(1, 3)})))
    compact(root.uri, shard_bytes=10 * 304, row_group_bytes=5 * 48)
    collect_garbage(root.uri, grace_s=0, now_s=2**33)
    kept = b"".join(root.read_bytes(info.key) for info in root.list("data"))
    assert latents[1, 2][0] in kept
    assert latents[1, 3][0] not in kept
    assert stored(root) == without((1, 3))
    tables = [pq.read_table(pa.BufferReader(root.read_bytes(i.key)), columns=["caption"]) for i in root.list("data")]
    assert latents[1, 3][1].decode() not in {text for t in tables for text in t["caption"].to_pylist()}


def test_the_list_is_kept_before_any_row_leaves(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash between the two: an encode that comes first stores nothing of it, the same command finishes."""
    listed = Listed(ids=frozenset({sample_id("source", "u0/r0.png")}))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pipeline.store.maintain.forget.Committer.commit", die)
        withdraw(root, listed)
    assert stored(root) == EVERYTHING
    assert Withdrawals.read(root, Withdrawals.keys(root)).holds(b"0" * 16, b"twice")
    assert withdraw(root, listed).rows == 2
    assert stored(root) == without((0, 0), (2, 4))


def test_a_list_that_matches_nothing_is_refused_and_writes_nothing_unless_it_is_kept(root: Root) -> None:
    listed = Listed(contents=frozenset({hashlib.sha256(b"to come").digest()}))
    with pytest.raises(InputError, match=r"No stored row of .* has any of the 1 names"):
        withdraw(root, listed)
    assert Withdrawals.keys(root) == ()
    assert withdraw(root, listed, keep_unmatched=True) == ForgetReport(0, 1, True, None)
    assert Withdrawals.read(root, Withdrawals.keys(root)).holds(b"0" * 16, b"to come")
    assert withdraw(root, listed) == ForgetReport(0, 1, False, None), "it is known by now"


def test_what_was_withdrawn_is_never_stored_again_under_any_name(root: Root, tmp_path: Path) -> None:
    withdraw(root, Listed(ids=frozenset({sample_id("source", "u0/r0.png"), sample_id("source", "u1/r0.png")})))
    images = tmp_path / "images"
    (images / "u1").mkdir(parents=True)
    for name, data in {"new.png": b"new", "another name.png": b"twice", "u1/r0.png": b"other content"}.items():
        (images / name).write_bytes(data)
    source = FolderSource(uri=str(images))
    units, number = group_units(list_entries(source), 10, 1 << 20), claim(root).number
    plan = append_version(read_plan(root), units, source={}, generation=number)
    unit = plan.next_unit - 1
    reader = UnitReader(root, source, {unit: plan.locate(unit)}, withdrawn=Withdrawals.keys(root))
    rows = {row["key"]: row for block in reader(Work(unit, ((0, None),))) for row in block.to_pylist()}
    assert rows["new.png"]["status"] == "ok"
    for name in ("another name.png", "u1/r0.png"):
        assert (rows[name]["status"], rows[name]["reason"], rows[name]["image"]) == ("filtered", "withdrawn", None)


def test_near_hashes_are_those_within_so_many_bits() -> None:
    rng = np.random.default_rng(0)
    listed = rng.integers(0, 1 << 63, 50, dtype=np.uint64)
    asked = np.concatenate([rng.integers(0, 1 << 63, 300, dtype=np.uint64), listed[:20]])
    for at in range(20):  # some bits away from one that is listed
        for bit in rng.choice(64, at % 6, replace=False).tolist():
            asked[300 + at] ^= np.uint64(1 << bit)
    for distance in (0, 1, 3, 5):
        bits = np.bitwise_count(asked[:, None] ^ listed[None])
        near = _NearHashes(listed.tolist(), distance)
        found, matched = near.find(pa.chunked_array([pa.array(asked)]))
        assert found.tolist() == (bits <= distance).any(axis=1).tolist()
        assert matched == {listed[at] for at in np.flatnonzero((bits <= distance).any(axis=0))}
    assert _NearHashes([0], 0).find(pa.chunked_array([pa.array([None, 0], pa.uint64())]))[0].tolist() == [False, True]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["name", "x"], "has none of these columns, but name"),
        (["content_sha256", "abc"], "has a name that is none"),
        (["content_sha256", "ab" * 31], "has a hash of another length"),
        (["uri", "s3://elsewhere/x.png"], "which lies in no source of the dataset"),
        (["key"], "names nothing"),
        (["phash", "xyz"], "has a name that is none"),
    ],
)
def test_a_list_that_is_none_says_what_it_should_be(
    root: Root, tmp_path: Path, lines: Sequence[str], said: str
) -> None:
    path = tmp_path / "list.csv"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=said):
        read_list(ForgetListConfig(uri=str(path)), read_plan(root))


def test_a_list_names_rows_in_four_ways(root: Root, tmp_path: Path) -> None:
    table = pa.table(
        {
            "key": ["u0/r0.png", None],
            "uri": ["mem/u1/r1.png", None],
            "content_sha256": pa.array([content(1, 2), None], pa.binary(32)),
            "phash": pa.array([None, phash(1, 3)], pa.uint64()),
            "why": ["asked for", "asked for"],
        }
    )
    pq.write_table(table, tmp_path / "list.parquet")
    listed = read_list(ForgetListConfig(uri=str(tmp_path / "list.parquet")), read_plan(root))
    ids = {sample_id("source", "u0/r0.png"), sample_id("source", "u1/r1.png")}
    assert listed == Listed(frozenset(ids), frozenset({content(1, 2)}), frozenset({phash(1, 3)}), 0)
    with pytest.raises(InputError, match="is not there"):
        read_list(ForgetListConfig(uri=str(tmp_path / "none.csv")), read_plan(root))
    with pytest.raises(InputError, match=r"more than list.max_bytes=10"):
        read_list(ForgetListConfig(uri=str(tmp_path / "list.parquet"), max_bytes=10), read_plan(root))


@pytest.mark.integration
def test_the_job_names_the_models_and_samples_whose_training_saw_them(root: Root, tmp_path: Path) -> None:
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/m.db", journal_dir=str(tmp_path / "journal"))

    def made(job: str, parents: dict[str, str], output: str) -> str:
        tracker = open_tracker(tracking, job=job, run_name=f"{job} it", resume_run_id=None, parents=parents)
        tracker.log_input(output, "ab" * 16, output, "output")
        tracker.finish("FINISHED")
        return str(tracker.run_id)

    encode = made("encode", {}, root.uri)
    note_run(root, 1, {"job": "encode", "handle": encode, "run_id": encode})
    train = made("train", {"encode": encode}, "/models/1")
    sample = made("sample", {"train": train}, "/samples/1")
    other = made("train", {}, "/models/2")
    (tmp_path / "list.csv").write_text("key,why\nu1/r2.png,asked for\nu1/none.png,asked for\n")
    arguments = (
        f"data.uri={root.uri}",
        f"list.uri={tmp_path}/list.csv",
        f"report={tmp_path}/report.json",
        f"tracking.uri={tracking.uri}",
        f"tracking.journal_dir={tmp_path}/journal",
    )
    code, answer, errors = run("forget", *arguments, "--dry-run", cwd=tmp_path)
    assert (code, answer["counts"]) == (0, {"listed": 2, "rows_to_compare": 15}), errors
    assert stored(root) == EVERYTHING
    code, answer, errors = run("forget", *arguments, cwd=tmp_path)
    assert code == 0, errors
    assert answer["counts"] == {"listed": 2, "unmatched": 1, "rows": 1, "models": 1, "samples": 1}
    assert "1 of 2 listed names match no stored row" in errors
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(m["run_id"], m["outputs"]) for m in report["models"]] == [(train, ["/models/1"])]
    assert [(s["run_id"], s["outputs"]) for s in report["samples"]] == [(sample, ["/samples/1"])]
    assert other not in json.dumps(report)
    assert answer["details"]["models"] == report["models"]
    assert stored(root) == without((1, 2))
    assert run("forget", *arguments, cwd=tmp_path)[1]["status"] == "unchanged"
