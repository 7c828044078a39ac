"""The encode job's `encode.dedup`: what it runs, notes and leaves, with the Ray passes replaced by plain commits.

The last test is one real run: duplicates, a filter, a reject and perceptual hashes together.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from pipeline.codec.codec import CodecInfo
from pipeline.config import load_config
from pipeline.encode import job
from pipeline.encode.config import EncodeJobConfig
from pipeline.encode.plan import fingerprint_of
from pipeline.errors import StoppedError
from pipeline.result import JobResult
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import Generation, claim_next, last_run, latest_number
from pipeline.store.ledger.state import read_state
from pipeline.store.maintain import dedup
from pipeline.store.maintain.verify import verify
from pipeline.store.plan import read_entries, read_plan
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.schema import LATENTS
from pipeline.tracking.tracker import NoopTracker
from tests.support.images import make_codec, make_images
from tests.support.jobs import run
from tests.support.rows import IDENTITY, committer, latent_rows


def _impatient(*args: Any, **settings: Any) -> Generation:
    """A generation that "crashed" in this very process counts as dead at once."""
    return claim_next(*args, **{**settings, "patience_s": 0.0})


class Tracker(NoopTracker):
    """A run with an id that remembers how it ended."""

    def __init__(self, number: int) -> None:
        self.run_id = self.handle = f"run-{number}"
        self.ended: list[str] = []

    def wait_run_id(self, timeout_s: float) -> str | None:
        return self.run_id

    def finish(self, status: str) -> None:
        self.ended.append(status)


INFO = CodecInfo("AutoencoderKL", {}, "0" * 64, 4, 8)


class World:
    """A folder of files and an encode job that "encodes" them by their bytes."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images, self.root = base / "images", Root(str(base / "out"))
        self.encoded: list[str] = []
        self.trackers: list[Tracker] = []
        self.resumed: list[str | None] = []
        self.images.mkdir()
        monkeypatch.setattr(job, "_check", lambda c: (Root(c.output.uri), INFO))
        monkeypatch.setattr(job, "_identity", lambda config, info, rehearsal: IDENTITY)
        monkeypatch.setattr("pipeline.runs.open_tracker", self.open_tracker)
        monkeypatch.setattr("pipeline.store.ledger.ledger.claim_next", _impatient)
        monkeypatch.setitem(
            sys.modules,
            "pipeline.encode.passes",
            SimpleNamespace(run_passes=self.run_passes, check_cluster=lambda config: None),
        )

    def write(self, **files: str) -> None:
        for name, content in files.items():
            (self.images / f"{name}.png").write_text(content)

    def run(self, *overrides: str) -> JobResult:
        fixed = [f"source.uri={self.images}", "source.kind=folder", f"output.uri={self.root.uri}", "codec.path=x"]
        fixed += ["codec.dtype=float32"]
        self.encoded.clear()
        return job.run(load_config(EncodeJobConfig, [], [*fixed, "encode.unit_rows=2", *overrides]))

    def open_tracker(self, *args: Any, resume_run_id: str | None, **kwargs: Any) -> Tracker:
        self.resumed.append(resume_run_id)
        self.trackers.append(Tracker(len(self.trackers)))
        return self.trackers[-1]

    def run_passes(self, config: Any, root: Root, generation: Any, info: Any, tracker: Any, retry: Any) -> Any:
        for unit, start, stop in read_state(root).gaps(retry).triples():
            for row in range(start, stop):
                key = self.key_of(unit, row)
                digest = hashlib.sha256((self.images / key).read_bytes()).digest()
                table = latent_rows([(unit, row)])
                at = LATENTS.get_field_index("content_sha256")
                table = table.set_column(at, "content_sha256", pa.array([digest], pa.binary(32))).cast(LATENTS)
                committer(root, generation).commit(table, None, {})
                self.encoded.append(key)
        return read_state(root)

    def key_of(self, unit: int, row: int) -> str:
        plan = read_plan(self.root)
        return read_entries(self.root, plan.locate(unit))[row].key

    def stored(self) -> list[str]:
        state = read_state(self.root)
        gone = [rows for group in (state.rejects, state.filtered) for rows in group.values()]
        left = state.covered - gone[0] if gone else state.covered
        return sorted(self.key_of(u, r) for u, a, b in left.triples() for r in range(a, b))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


@pytest.mark.integration
def test_duplicates_are_filtered_once_and_nothing_is_encoded_again(world: World) -> None:
    world.write(a="one", b="two", c="one", d="one")
    result = world.run("encode.dedup=exact")
    assert (result.status, result.counts["latents"], result.counts["filtered.duplicate_content"]) == ("done", 2, 2)
    assert world.stored() == ["a.png", "b.png"]
    assert verify(world.root.uri, "checksums").problems == []
    again = world.run("encode.dedup=exact")
    assert (again.status, world.encoded) == ("unchanged", [])
    assert {**again.counts, "source_new": 4} == {**result.counts, "source_new": 4}
    assert again.run_id == result.run_id == "run-0"
    assert world.trackers[0].ended == ["FINISHED"]
    assert (last_run(world.root)["run_id"], last_run(world.root)["unfinished"]) == ("run-0", False)
    assert len(world.trackers) == 1
    generations = latest_number(world.root)
    world.run("encode.dedup=exact")
    assert latest_number(world.root) == generations + 1  # a look, and no deduplication


def test_it_is_off_unless_asked_for_and_can_be_turned_on_later(world: World) -> None:
    world.write(a="one", b="one")
    assert world.run().counts["latents"] == 2
    result = world.run("encode.dedup=exact")
    assert (result.status, result.counts["latents"], world.encoded) == ("done", 1, [])
    assert world.run().counts["latents"] == 1
    back = world.run("encode.retry_rejects=[duplicate_content]")
    assert (back.counts["latents"], world.encoded) == (2, ["b.png"])


def test_later_files_give_way_to_older_ones_and_come_back_when_those_go(world: World) -> None:
    world.write(b="one")
    world.run("encode.dedup=exact")
    world.write(a="one", c="one", d="two")
    world.run("encode.dedup=exact")
    assert world.stored() == ["b.png", "d.png"]
    assert world.encoded == ["a.png", "c.png", "d.png"]
    (world.images / "b.png").unlink()
    kept = world.run("encode.dedup=exact")
    assert (kept.status, world.stored()) == ("unchanged", ["b.png", "d.png"])
    world.run("encode.dedup=exact", "encode.on_removed=drop")
    assert world.stored() == ["a.png", "d.png"]
    assert verify(world.root.uri, "checksums").problems == []
    assert world.run("encode.dedup=exact", "encode.on_removed=drop").status == "unchanged"


@pytest.mark.parametrize("error", [StoppedError("Stopped by SIGTERM"), OSError("the machine went away")])
def test_a_run_that_died_in_the_deduplication_goes_on_in_the_same_tracking_run(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    world.write(a="one", b="one", c="two")

    def die(rows: Any) -> Any:
        raise error

    real = dedup.first_of_each
    monkeypatch.setattr(dedup, "first_of_each", die)
    with pytest.raises(type(error)):
        world.run("encode.dedup=exact")
    assert world.trackers[0].ended == ["KILLED" if isinstance(error, StoppedError) else "FAILED"]
    assert verify(world.root.uri, "checksums").problems == []
    monkeypatch.setattr(dedup, "first_of_each", real)
    result = world.run("encode.dedup=exact")
    assert (result.status, world.encoded, world.stored()) == ("done", [], ["a.png", "c.png"])
    assert world.resumed == [None, "run-0"]
    assert not last_run(world.root)["unfinished"]


def test_a_run_that_died_before_the_deduplication_began_is_finished_too(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.write(a="one", b="one")
    with monkeypatch.context() as patch:
        patch.setattr(job, "deduplicate", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            world.run("encode.dedup=exact")
    assert last_run(world.root)["unfinished"]
    assert world.run("encode.dedup=exact").counts["latents"] == 1
    assert (world.encoded, world.resumed) == ([], [None, "run-0"])


def test_the_fingerprint_does_not_know_of_it() -> None:
    fixed = ["source.uri=x", "source.kind=folder", "output.uri=y", "codec.path=z"]
    info = SimpleNamespace(
        as_dict=lambda: {"class_name": "Toy", "weights_sha256": "00"}, resolved_config=lambda: {"latent_channels": 4}
    )
    prints = [
        fingerprint_of(load_config(EncodeJobConfig, [], [*fixed, f"encode.dedup={d}"]), info)[0]  # type: ignore[arg-type]
        for d in ("off", "exact")
    ]
    assert prints[0] == prints[1]


@pytest.mark.ray
def test_a_real_run_accounts_for_duplicates_filters_and_rejects_and_stores_hashes(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    images = make_images(tmp_path / "images", 12, broken=1)
    # Copies of three files under later names, and of one the same picture in another coding.
    for number in (2, 5, 7):
        (images / f"copy-{number}.png").write_bytes((images / f"{number:05d}.png").read_bytes())
    Image.open(images / "00004.png").save(images / "recoded.jpg", quality=95)
    names = sorted(p.name for p in images.iterdir() if p.suffix in (".png", ".jpg"))
    lines = [json.dumps({"file_name": n, "score": 1 if n in ("00000.png", "00009.png") else 9}) for n in names]
    (images / "metadata.jsonl").write_text("\n".join(lines))
    make_codec(tmp_path / "codec")
    out = tmp_path / "latents"
    arguments = [
        f"source.uri={images}",
        "source.kind=folder",
        "source.filter=score > 5",
        "image.resolution=[32, 16]",
        "image.flip=true",
        "image.multiple_of=4",
        "image.phash=true",
        f"codec.path={tmp_path / 'codec'}",
        f"output.uri={out}",
        "encode.dedup=exact",
        "encode.unit_rows=4",
        "cluster.num_cpus=2",
        "cluster.dashboard=false",
        "tracking.enabled=false",
    ]
    code, answer, errors = run("encode", *arguments, cwd=tmp_path)
    assert code == 0, errors
    counts = answer["counts"]
    assert (counts["filtered.duplicate_content"], counts["filtered.row_filter"], counts["rejected"]) == (3, 2, 1)
    # Conservation: each of the 17 files has one outcome.
    assert (len(names), counts["latents"], counts["filtered"]) == (17, 11, 5)
    assert verify(str(out), "checksums").problems == []
    again = run("encode", *arguments, cwd=tmp_path)
    assert (again[0], again[1]["status"]) == (0, "unchanged")

    dataset = LatentDataset.open(str(out))
    columns = ["key", "variant", "bucket", "flipped", "phash", "content_sha256"]
    rows = [r for g in dataset.row_groups for r in dataset.read(g.index, columns).to_pylist()]
    kept = {r["key"] for r in rows}
    assert kept == {n for n in names if n[:4] not in ("copy", "brok") and n not in ("00000.png", "00009.png")}
    # Two resolutions, each plain and flipped, of every source row; one hash for all of them.
    shapes = sorted((r["variant"], r["bucket"], r["flipped"]) for r in rows if r["key"] == "00003.png")
    assert shapes == [(0, "32x32", False), (1, "32x32", True), (2, "16x16", False), (3, "16x16", True)]
    assert len(rows) == 4 * len(kept)
    hashes = {key: {r["phash"] for r in rows if r["key"] == key} for key in kept}
    assert all(len(found) == 1 and None not in found for found in hashes.values())

    def distance(a: str, b: str) -> int:
        return int(np.bitwise_count(np.uint64(next(iter(hashes[a]))) ^ np.uint64(next(iter(hashes[b])))))

    assert distance("00004.png", "recoded.jpg") <= 6
    others = [distance("00004.png", k) for k in kept if k not in ("00004.png", "recoded.jpg")]
    assert min(others) > 6
