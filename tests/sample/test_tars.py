"""Images as WebDataset shards, and objects outside of data files: whole, verified, and left alone by gc."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.media import read_provenance
from pipeline.sample.denoise import Denoiser, use_threads
from pipeline.sample.output import show
from pipeline.sample.plan import freeze_requests
from pipeline.sample.prepare import SamplingInputs, on_device, prepare
from pipeline.sample.stages import FINISHED, CommitImages, DecodeLatents, DecoderSpec, EncodeImages, pack_units
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import claim_next
from pipeline.store.ledger.identity import claim_identity
from pipeline.store.ledger.ledger import collect
from pipeline.store.maintain.verify import verify
from pipeline.store.plan import read_plan
from pipeline.store.read.dataset import Dataset, place_in, problems_outside, read_outside
from pipeline.store.writer import Committer
from tests.sample.conftest import Tiny
from tests.sample.test_draw import job
from tests.support.maintain import collect_garbage
from tests.support.monitor import LocalMonitor


@pytest.fixture(scope="module")
def prepared(tiny: Tiny) -> SamplingInputs:
    ready = prepare(job(tiny))
    return replace(ready, draw=on_device(ready.draw, "cpu"))


@pytest.fixture(scope="module")
def written(
    prepared: SamplingInputs, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, pa.Table]]:
    """A function that writes a whole output of some form, unit by unit, as the job's stages do, without Ray."""
    use_threads(1)
    denoiser = Denoiser.load(prepared.model.uri, prepared.draw)
    decode = DecodeLatents(DecoderSpec(prepared.codec_path, "auto", None, prepared.draw), LocalMonitor())

    def write(form: str) -> tuple[Path, pa.Table]:
        path = tmp_path_factory.mktemp(form)
        root = Root(str(path))
        claim_identity(root, prepared.identity)
        generation = claim_next(root, lambda number: collect(root, number), job="sample")
        _, plan = freeze_requests(
            read_plan(root), prepared.requests.table, unit_requests=4, source={}, generation=generation.number
        )
        encode = EncodeImages(prepared.draw, prepared.origin, root if form == "files" else None)
        committer = Committer(root, generation.number, 1 << 20, None, {})
        commit = CommitImages(committer, root if form == "webdataset" else None)
        finished = [encode(decode(denoiser(plan.slice(start, 4)))) for start in (0, 4, 8)]
        assert finished[0].schema == FINISHED
        # Two units in one write, in the wrong order, and one by itself.
        commit(pa.concat_tables([finished[2], finished[0]]))
        commit(finished[1])
        generation.close({"status": "done"})
        return path, plan

    return write


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    dataset: Dataset = Dataset.open_kind(str(path), "images")
    return {r["key"]: r for g in dataset.row_groups for r in dataset.read(g.index, None).to_pylist()}


def test_shards_hold_what_rows_name(written: Callable[[str], tuple[Path, pa.Table]]) -> None:
    path, _ = written("webdataset")
    rows, root = rows_of(path), Root(str(path))
    assert len(rows) == 9
    members: dict[str, bytes] = {}
    shards = sorted((path / "shards").iterdir())
    assert [s.name[:9] for s in shards] == ["00000000-", "00000001-", "00000002-"]
    for shard in shards:
        assert shard.name[9:25] == hashlib.sha256(shard.read_bytes()).hexdigest()[:16]
        with tarfile.open(shard) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                assert member.name not in members
                opened = tar.extractfile(member)
                assert opened is not None
                members[member.name] = opened.read()
    for key, row in rows.items():
        assert row["image"] == b""
        image = read_outside(root, row["file"])
        assert image == members[f"{key}.png"]
        assert hashlib.sha256(image).digest() == row["content_sha256"]
        assert read_provenance(image) == json.loads(members[f"{key}.json"])
        assert members[f"{key}.cls"] == str(row["label"]).encode()
    assert len(members) == 27
    assert verify(str(path), "checksums").problems == []


def test_shards_do_not_depend_on_how_they_came_about(written: Callable[[str], tuple[Path, pa.Table]]) -> None:
    path, _ = written("webdataset")
    again, _ = written("webdataset")
    names = sorted(p.name for p in (path / "shards").iterdir())
    assert names == sorted(p.name for p in (again / "shards").iterdir())
    assert all((path / "shards" / n).read_bytes() == (again / "shards" / n).read_bytes() for n in names)


def test_a_prompt_is_a_member_too(prepared: SamplingInputs) -> None:
    denoised = Denoiser.load(prepared.model.uri, prepared.draw)(
        prepared.requests.table.slice(0, 1).append_column("unit", pa.array([7])).append_column("row", pa.array([0]))
    )
    decode = DecodeLatents(DecoderSpec(prepared.codec_path, "auto", None, prepared.draw), LocalMonitor())
    table = EncodeImages(prepared.draw, prepared.origin, None)(decode(denoised))
    from pipeline.sample.output import IMAGES

    rows = table.select(IMAGES.names).cast(IMAGES)
    at = rows.schema.get_field_index("prompt")
    rows = rows.set_column(at, rows.schema.field(at), pa.array(["ein Bär"], pa.string()))
    stored: dict[str, bytes] = {}
    packed = pack_units(rows, lambda key, data: stored.setdefault(key, data) is data)
    assert packed.schema == IMAGES
    ((name, data),) = stored.items()
    assert name.startswith("shards/00000007-")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        text = tar.extractfile(f"{rows['key'][0].as_py()}.txt")
        assert text is not None
        assert text.read().decode() == "ein Bär"
    assert pack_units(rows.slice(0, 0), lambda key, data: pytest.fail("nothing to put")).num_rows == 0


@pytest.mark.parametrize("form", ["files", "webdataset"])
def test_verify_finds_what_is_missing_short_or_altered(
    written: Callable[[str], tuple[Path, pa.Table]], form: str
) -> None:
    path, _ = written(form)
    assert verify(str(path), "files").problems == []
    place = sorted(rows_of(path).values(), key=lambda r: r["file"])[0]["file"]
    victim = path / place.partition("#")[0]
    whole = victim.read_bytes()
    start = int(place.partition("#")[2].partition("+")[0] or 0)
    victim.write_bytes(whole[: start + 40] + bytes([whole[start + 40] ^ 1]) + whole[start + 41 :])
    assert verify(str(path), "files").problems == []
    (problem,) = verify(str(path), "checksums").problems
    assert (problem["kind"], problem["where"]) == ("checksum", place)
    victim.write_bytes(whole[:16] if form == "webdataset" else b"")
    assert {p["kind"] for p in verify(str(path), "files").problems} == {"size"}
    victim.unlink()
    problems = verify(str(path), "files").problems
    assert {p["kind"] for p in problems} == {"missing"}
    assert len(problems) == (1 if form == "files" else 4)


def files(path: Path) -> set[Path]:
    """Everything below a root but who wrote it when, which collecting garbage adds to."""
    names = (p.relative_to(path) for p in path.rglob("*") if p.is_file())
    return {path / name for name in names if name.parts[0] not in ("generations", "snapshots", "ledger")}


@pytest.mark.parametrize("form", ["files", "webdataset", "parquet"])
def test_garbage_collection_leaves_images_and_pages_alone(
    written: Callable[[str], tuple[Path, pa.Table]], form: str
) -> None:
    path, plan = written(form)
    names = plan["request_id"].to_pylist()
    assert set(show(str(path), plan, names, 9, {})) == {"contact", "gallery"}
    gallery = (path / "gallery.html").read_text()
    for told in ("owl · seed 0", "a &lt;b&gt;fox&lt;/b&gt; · seed 0", "class 2 · seed 0"):
        assert told in gallery, told
    orphan = path / "data" / "left-over.parquet"
    orphan.write_bytes(b"left by a crash")
    before = files(path) - {orphan}
    for p in path.rglob("*"):
        if p.is_file():
            os.utime(p, (1, 1))
    assert collect_garbage(str(path), grace_s=0)[0] == 1
    assert files(path) == before
    assert {"contact.png", "gallery.html"} <= {p.name for p in before}
    assert verify(str(path), "checksums").problems == []


def test_an_object_that_cannot_be_read_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Root(str(tmp_path))
    root.put("images/a.png", b"bytes")
    table = pa.table({"file": ["images/a.png", None], "content_sha256": [hashlib.sha256(b"bytes").digest(), None]})
    assert list(problems_outside(root, table, read=True)) == []

    def broken(self: Root, key: str) -> bytes:
        raise PermissionError("denied")

    monkeypatch.setattr(Root, "read_bytes", broken)
    assert [kind for kind, _, _ in problems_outside(root, table, read=True)] == ["unreadable"]
    assert place_in("a.tar", 512, 7) == "a.tar#512+7"
