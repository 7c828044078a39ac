"""The encode job as its users run it: one dataset through additions, changes, retries, budgets and compaction."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow.parquet as pq
import pytest

from pipeline.store.maintain.verify import verify
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.schema import LATENTS
from pipeline.tracking.store import MlflowStore
from tests.support.images import make_codec, make_images
from tests.support.jobs import run

pytestmark = pytest.mark.ray


def arguments(base: Path, **changes: Any) -> list[str]:
    settings = {
        "source.kind": "folder",
        "source.uri": base / "images",
        "image.resolution": 32,
        "image.multiple_of": 4,
        "codec.path": base / "codec",
        "output.uri": base / "latents",
        "encode.unit_rows": 16,
        "encode.batch_size": 8,
        "cluster.num_cpus": 2,
        "cluster.dashboard": "false",
        "tracking.uri": f"sqlite:///{base}/mlflow.db",
        "tracking.journal_dir": base / "journal",
        **changes,
    }
    return [f"{k}={v}" for k, v in settings.items()]


def rows(base: Path, output: str = "latents") -> dict[str, bytes]:
    dataset = LatentDataset.open(str(base / output))
    tables = [dataset.read(g.index, ["key", "latent"]) for g in dataset.row_groups]
    return {k: v for t in tables for k, v in zip(t["key"].to_pylist(), t["latent"].to_pylist(), strict=True)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encode")
    make_images(path / "images", 40, broken=3)
    make_codec(path / "codec")
    return path


def test_a_dataset_through_its_life(base: Path) -> None:
    code, first, errors = run("encode", *arguments(base), cwd=base)
    assert code == 0, errors
    assert first["status"] == "done"
    assert (first["counts"]["latents"], first["counts"]["rejected"]) == (40, 3)
    assert first["mlflow_run_id"]
    assert first["rates"]["images_per_s"] > 0
    dataset = LatentDataset.open(str(base / "latents"))
    schema = pq.read_schema(base / "latents" / dataset.row_groups[0].file)
    assert {field.name: field.nullable for field in schema} == {f.name: f.nullable for f in LATENTS}
    before = rows(base)
    tracked = MlflowStore(f"sqlite:///{base}/mlflow.db").client
    shown = [file.path for file in tracked.list_artifacts(first["mlflow_run_id"], "pictures")]
    assert shown == [f"pictures/{name}" for name in ("left_out.html", "round_trips.png", "sizes.html")]
    artifacts = Path(unquote(urlsplit(tracked.get_run(first["mlflow_run_id"]).info.artifact_uri).path))
    left_out, sizes = ((artifacts / "pictures" / name).read_text() for name in ("left_out.html", "sizes.html"))
    assert "3 source rows, rejected" in left_out
    assert "broken-000.png" in left_out
    assert "32x32" in sizes
    assert "1 to 63" in sizes
    points = tracked.get_metric_history(first["mlflow_run_id"], "progress/rows")
    assert max(point.step for point in points) == 43  # the last report is a point, too
    told = tracked.get_run(first["mlflow_run_id"]).data.tags["mlflow.note.content"]
    assert told.startswith("40 latents of `")
    assert "| 32x32 | 40 |" in told
    assert "| rejected: " in told

    # Nothing to do: no Ray, no new run, the same answer.
    code, again, errors = run("encode", *arguments(base), cwd=base)
    assert (code, again["status"], again["mlflow_run_id"]) == (0, "unchanged", first["mlflow_run_id"])

    # One new, one changed, one gone.
    make_images(base / "more", 42)
    (base / "images" / "00041.png").write_bytes((base / "more" / "00041.png").read_bytes())
    (base / "images" / "00007.png").write_bytes((base / "more" / "00040.png").read_bytes())
    lines = (base / "images" / "metadata.jsonl").read_text().splitlines(keepends=True)
    (base / "images" / "metadata.jsonl").write_text("".join(line for line in lines if "00009" not in line))
    (base / "images" / "00009.png").unlink()
    code, second, errors = run("encode", *arguments(base), cwd=base)
    assert code == 0, errors
    counts = second["counts"]
    assert (counts["source_new"], counts["source_changed"], counts["source_removed"]) == (1, 1, 1)
    assert "00009.png" in errors  # what is gone is reported, and kept
    after = rows(base)
    assert set(after) == set(before) | {"00041.png"}
    assert {k for k in before if after[k] != before[k]} == {"00007.png"}
    assert second["mlflow_run_id"] != first["mlflow_run_id"]

    # Compaction and a dropped source change nothing else.
    code, answer, errors = run("compact", f"data.uri={base}/latents", cwd=base)
    assert (code, answer["counts"]["shards_written"]) == (0, 1), errors
    assert rows(base) == after
    code, _, errors = run("encode", *arguments(base, **{"encode.on_removed": "drop"}), cwd=base)
    assert code == 0, errors
    assert rows(base) == {k: v for k, v in after.items() if k != "00009.png"}
    code, answer, errors = run("verify", f"data.uri={base}/latents", cwd=base)
    assert code == 0, errors
    assert (answer["counts"]["latents"], answer["counts"]["rejected"]) == (40, 3)


def test_rejects_can_be_tried_again(base: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "images", 6)
    (tmp_path / "codec").symlink_to(base / "codec")
    victim = tmp_path / "images" / "00003.png"
    good, stat = victim.read_bytes(), victim.stat()
    victim.write_bytes(good[:60] + bytes(len(good) - 60))
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    code, answer, errors = run("encode", *arguments(tmp_path, **{"encode.reject_budget": 0.1}), cwd=tmp_path)
    assert code == 5, errors
    assert "rejected" in errors
    assert answer["status"] == "rejects-over-budget"
    assert (answer["counts"]["latents"], answer["counts"]["rejected"]) == (5, 1)
    assert answer["outputs"]["dataset"].endswith("latents")
    assert len(rows(tmp_path)) == 5  # the data is kept
    (reject,) = [
        r for p in (tmp_path / "latents" / "rejects").glob("*.parquet") for r in pq.read_table(p).to_pylist()
    ]
    assert reject["key"] == "00003.png"
    assert reject["uri"].endswith("images/00003.png")

    victim.write_bytes(good)
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    retry = {"encode.retry_rejects": f"[{reject['reason']}]"}
    code, answer, errors = run("encode", *arguments(tmp_path, **retry), cwd=tmp_path)
    assert code == 0, errors
    assert (answer["counts"]["latents"], answer["counts"]["rejected"]) == (6, 0)
    assert verify(str(tmp_path / "latents"), "checksums").problems == []


def test_decode_tasks_and_other_pools_give_the_same_bytes(base: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "images", 24)
    (tmp_path / "codec").symlink_to(base / "codec")
    shapes = [
        {"encode.actors": 1},
        {
            "encode.decode": "tasks",
            "encode.decode_cpus": 0.5,
            "encode.unit_rows": 5,
            "encode.units_per_execution": 2,
            "encode.fragment_rows": 6,
        },
    ]
    found = []
    for number, shape in enumerate(shapes):
        changes = {**shape, "output.uri": tmp_path / f"out{number}"}
        code, _, errors = run("encode", *arguments(tmp_path, **changes), cwd=tmp_path)
        assert code == 0, errors
        found.append(rows(tmp_path, f"out{number}"))
    assert len(found[0]) == 24
    assert found[0] == found[1]


def test_another_fingerprint_is_a_conflict_that_names_the_fields(base: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "images", 4)
    make_codec(tmp_path / "codec")
    code, _, errors = run("encode", *arguments(tmp_path), cwd=tmp_path)
    assert code == 0, errors
    changes = {"image.resolution": 64, "encode.latent_dtype": "bfloat16"}
    code, answer, errors = run("encode", *arguments(tmp_path, **changes), cwd=tmp_path)
    assert (code, answer["status"]) == (4, "conflict")
    assert "latent_dtype: float16 there, bfloat16 here" in errors
    assert "image.buckets" in errors
    make_codec(tmp_path / "codec", seed=9)
    code, _, errors = run("encode", *arguments(tmp_path), cwd=tmp_path)
    assert code == 4
    assert "codec.weights_sha256" in errors


def test_a_pool_that_cannot_fit_is_refused_at_once(base: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "images", 4)
    (tmp_path / "codec").symlink_to(base / "codec")
    changes = {"encode.actors": 2, "encode.num_cpus": 1.0, "tracking.enabled": "false"}
    code, _, errors = run("encode", *arguments(tmp_path, **changes), cwd=tmp_path)
    assert code == 2, errors
    assert "it would wait for ever" in errors
