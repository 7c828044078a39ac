"""Kill a sampling job anywhere: every request becomes one image, with the bytes of a run that nothing disturbed."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage.root import Root
from pipeline.store.maintain.verify import verify
from pipeline.store.read.dataset import Dataset, read_outside
from tests.sample.conftest import Tiny, make_tiny
from tests.support.jobs import run, start
from tests.support.kills import Struck, disturb

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CLASSES, SEEDS = 3, 60
REQUESTS = CLASSES * SEEDS


def arguments(tiny: Tiny, output: Path, **extra: Any) -> list[str]:
    settings = {
        "model.uri": tiny.model_uri,
        "output.uri": output,
        "requests.kind": "grid",
        "requests.classes": "all",
        "requests.count": SEEDS,
        "requests.steps": 30,
        "requests.guidance": 2.0,
        "batch_size": 4,
        "unit_requests": 8,
        "denoise.actors": 2,
        "write.fragment_rows": 8,
        "cluster.num_cpus": 4,
        "cluster.dashboard": "false",
        "tracking.enabled": "false",
        **extra,
    }
    return [f"{k}={v}" for k, v in settings.items()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sample-kills")


@pytest.fixture(scope="module")
def tiny(base: Path) -> Tiny:
    return make_tiny(base)


@pytest.fixture(scope="module")
def calm(base: Path, tiny: Tiny) -> dict[bytes, dict[str, Any]]:
    code, answer, errors = run("sample", *arguments(tiny, base / "calm", **{"denoise.actors": 1}), cwd=base)
    assert code == 0, errors
    assert answer["counts"]["images"] == REQUESTS
    return content(base / "calm")


def content(uri: Path) -> dict[bytes, dict[str, Any]]:
    """Every visible row by request, its image bytes wherever they lie; fails on a repeated one."""
    dataset: Dataset = Dataset.open_kind(str(uri), "images")
    rows: dict[bytes, dict[str, Any]] = {}
    for group in dataset.row_groups:
        for row in dataset.read(group.index, None).to_pylist():
            assert row["sample_id"] not in rows
            row["image"] = row["image"] or read_outside(dataset.root, row["file"])
            assert hashlib.sha256(row["image"]).digest() == row["content_sha256"]
            rows[row["sample_id"]] = {k: v for k, v in row.items() if k != "file"}
    return rows


def check(output: Path, calm: dict[bytes, dict[str, Any]]) -> None:
    assert content(output) == calm
    report = verify(str(output), "checksums")
    assert report.problems == []
    assert (report.planned_rows, report.stored_rows) == (REQUESTS, REQUESTS)


def killed(base: Path, tiny: Tiny, name: str, seed: int, kills: int, **extra: Any) -> Struck:
    def has_begun(output: str) -> bool:
        return any(info.key.endswith(".json") for info in Root(str(base / output)).list("ledger"))

    def command(output: str) -> list[str]:
        return arguments(tiny, base / output, **extra)

    return disturb("sample", command, name, kills=kills, seed=seed, cwd=base, under_way=has_begun)


@pytest.mark.parametrize(("form", "seed", "kills"), [("parquet", 1, 6), ("files", 2, 4), ("webdataset", 3, 4)])
def test_random_kills_lose_repeat_and_change_nothing(
    base: Path, tiny: Tiny, calm: dict[bytes, dict[str, Any]], form: str, seed: int, kills: int
) -> None:
    struck = killed(base, tiny, f"killed-{form}", seed, kills, **{"output.format": form})
    assert struck.total >= kills
    for output in struck.outputs:
        check(base / output, calm)
    if form == "webdataset":
        # The shards are a function of the requests: nothing of how they came about is in their names or bytes.
        code, _, errors = run(
            "sample", *arguments(tiny, base / "calm-tars", **{"output.format": form, "denoise.actors": 1}), cwd=base
        )
        assert code == 0, errors
        told = {row["file"] for row in rows_of(base / "calm-tars")}
        for output in struck.outputs:
            assert {row["file"] for row in rows_of(base / output)} == told
            for tar in (base / "calm-tars" / "shards").iterdir():
                assert (base / output / "shards" / tar.name).read_bytes() == tar.read_bytes()


@pytest.mark.soak
def test_soak_of_sampling(
    base: Path, tiny: Tiny, calm: dict[bytes, dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    seed, kills = request.config.getoption("--kill-seed"), request.config.getoption("--kills")
    struck = killed(base, tiny, "soaked", seed, kills)
    print("killed:", struck.kills, "in", len(struck.outputs), "finished runs")
    assert struck.total >= kills
    for output in struck.outputs:
        check(base / output, calm)


def rows_of(uri: Path) -> list[dict[str, Any]]:
    dataset: Dataset = Dataset.open_kind(str(uri), "images")
    return [row for g in dataset.row_groups for row in dataset.read(g.index, ["key", "file"]).to_pylist()]


def test_two_jobs_at_once_are_one_that_goes_on_and_one_that_steps_back(
    base: Path, tiny: Tiny, calm: dict[bytes, dict[str, Any]]
) -> None:
    both = [start("sample", *arguments(tiny, base / "two"), cwd=base) for _ in range(2)]
    outcomes = [p.communicate(timeout=600) for p in both]
    assert sorted(p.returncode for p in both) == [0, 4], outcomes
    check(base / "two", calm)


def test_a_model_that_an_actor_cannot_load_ends_the_job_as_bad_input(base: Path, tiny: Tiny) -> None:
    """The driver reads no weights: that they are damaged is found out where they are loaded."""
    export = base / "damaged"
    shutil.copytree(tiny.model_uri, export)
    weights = export / "model" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    code, answer, errors = run("sample", *arguments(tiny, base / "none", **{"model.uri": export}), cwd=base)
    assert code == 3, errors
    assert answer["error"] == "the weights are not those that were exported"
    assert "Traceback" not in errors
