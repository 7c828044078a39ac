"""Jobs over bad connections: they finish, or stop so that the same command finishes, and the data are whole."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage.root import Root
from pipeline.store.maintain.verify import verify
from tests.s3.settings import encode_settings, sample_settings, succeed, train_settings, uploaded, words
from tests.support.fault_proxy import FaultProxy
from tests.support.images import make_codec, make_images
from tests.support.jobs import run, start
from tests.support.radosgw import Radosgw
from tests.support.servers import use_store

pytestmark = [pytest.mark.s3, pytest.mark.slow, pytest.mark.ray]

IMAGES = 24
OFF: dict[str, object] = {"tracking.enabled": "false"}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("s3-faults")
    make_images(base / "images", IMAGES)
    make_codec(base / "codec")
    return base


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that wait seconds for an answer, not half minutes."""
    monkeypatch.setenv("FSSPEC_S3", '{"config_kwargs": {"connect_timeout": 2, "read_timeout": 3}}')


def finish(job: str, settings: dict[str, object], cwd: Path, tries: int = 4) -> tuple[list[int], dict[str, Any]]:
    """Run the same command until it is done; every exit before that must be one that asks for it."""
    codes: list[int] = []
    for _ in range(tries):
        code, answer, errors = run(job, *words(settings), cwd=cwd, timeout=900)
        assert code in (0, 3, 75), errors
        assert "Traceback" not in errors.replace("(most recent call last)", "") or "ray" in errors
        codes.append(code)
        if code == 0:
            return codes, answer
    pytest.fail(f"{job} ended with {codes}:\n{errors}")


def make_noise(proxy: FaultProxy) -> None:
    proxy.fail("status", share=0.06)
    proxy.fail("status", share=0.04, code=500)
    proxy.fail("reset", share=0.04)
    proxy.fail("lost_answer", method="PUT", share=0.06)
    proxy.fail("truncate", method="GET", share=0.06)
    proxy.fail("stall", share=0.01)


def test_the_chain_runs_over_a_bad_connection(
    s3_environment: Radosgw, s3_proxy: FaultProxy, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = uploaded(s3_environment, local)
    good, bad = s3_environment.environment(), s3_environment.environment(endpoint=s3_proxy.url)
    use_store(monkeypatch, bad)
    make_noise(s3_proxy)
    _, encoded = finish(
        "encode", encode_settings(bucket, **OFF, **{"encode.retry_rejects": "[read_failed]"}), tmp_path
    )
    assert encoded["counts"]["latents"] == IMAGES
    finish("train", train_settings(bucket, **OFF), tmp_path)
    finish("sample", sample_settings(bucket, f"{bucket}/run/model", **OFF), tmp_path)
    struck = dict(s3_proxy.struck)
    assert {"status", "reset", "lost_answer", "truncate"} <= struck.keys(), struck
    s3_proxy.heal()
    use_store(monkeypatch, good)
    for name, rows in (("latents", IMAGES), ("samples", 5)):
        report = verify(f"{bucket}/{name}", "checksums")
        assert (report.problems, report.stored_rows, report.rejected_rows) == ([], rows, 0)
    # What was drawn over the bad connection is what a good one gives.
    again = sample_settings(bucket, f"{bucket}/run/model", **OFF) | {"output.uri": f"{bucket}/again"}
    succeed("sample", again, tmp_path)
    digests = [_images(f"{bucket}/{name}") for name in ("samples", "again")]
    assert digests[0] == digests[1]
    print(struck)


def _images(uri: str) -> dict[bytes, bytes]:
    from pipeline.store.read.dataset import Dataset

    samples: Any = Dataset.open_kind(uri, "images", "uri")
    tables = [samples.read(group.index, ["sample_id", "image"]) for group in samples.row_groups]
    return {row["sample_id"]: row["image"] for table in tables for row in table.to_pylist()}


@pytest.mark.parametrize("how", ["freeze", "kill"])
def test_a_store_that_goes_away_stops_the_job_and_the_same_command_finishes(
    s3_environment: Radosgw, local: Path, tmp_path: Path, how: str
) -> None:
    bucket = uploaded(s3_environment, local)
    settings = encode_settings(bucket, **OFF, **{"encode.unit_rows": 2, "encode.fragment_rows": 2})
    process = start("encode", *words(settings), cwd=tmp_path)
    root = Root(f"{bucket}/latents")
    while process.poll() is None and not any("commit" in i.key or "ledger/" in i.key for i in root.list("ledger")):
        time.sleep(0.2)
    assert process.poll() is None
    try:
        (s3_environment.freeze_gateway if how == "freeze" else s3_environment.kill_gateway)()
        _, errors = process.communicate(timeout=600)
    finally:
        (s3_environment.thaw_gateway if how == "freeze" else s3_environment.start_gateway)()
    assert process.returncode in (3, 5, 75), errors
    assert "this is a bug" not in errors
    settings["encode.retry_rejects"] = "[read_failed]"
    assert succeed("encode", settings, tmp_path)["counts"]["latents"] == IMAGES
    report = verify(f"{bucket}/latents", "checksums")
    assert (report.problems, report.stored_rows) == ([], IMAGES)
    assert os.environ["AWS_ENDPOINT_URL"] == s3_environment.endpoint
