"""Tracking against MLflow as it is run in earnest: PostgreSQL, users and passwords, artifacts in S3."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.tracking import tracker as tracker_module
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.delivery import replay
from pipeline.tracking.journal import journals
from pipeline.tracking.queries import descend, opened, resolve, walk
from pipeline.tracking.store import MlflowStore
from pipeline.tracking.tracker import Tracker, open_tracker
from tests.support.fault_proxy import FaultProxy
from tests.support.jobs import run as run_job
from tests.support.mlflow_server import MlflowServer
from tests.support.radosgw import Radosgw

pytestmark = [pytest.mark.s3, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _let_in(mlflow_stack: MlflowServer, monkeypatch: pytest.MonkeyPatch, _own_environment: None) -> None:
    assert mlflow_stack.auth is not None
    for name, value in mlflow_stack.auth.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    monkeypatch.setattr(tracker_module, "FLUSH_PERIOD_S", 0.05)
    monkeypatch.setattr("pipeline.tracking.flusher.LONGEST_BACKOFF_S", 1.0)


def tracking_to(uri: str, tmp_path: Path, close_timeout_s: float = 120.0) -> TrackingConfig:
    return TrackingConfig(uri=uri, journal_dir=str(tmp_path / "journal"), close_timeout_s=close_timeout_s)


def begin(tracking: TrackingConfig, **options: str) -> Tracker:
    return open_tracker(tracking, job="train", run_name="n", **options)  # type: ignore[arg-type]


def log(tracker: Tracker, start: int, stop: int) -> None:
    for step in range(start, stop):
        tracker.log_metrics({"loss": step / 7, "lr": 0.5}, step=step)


def settle(tracking: TrackingConfig) -> None:
    """Send what a server that was too slow for the end of the job has left: as the next job would."""
    if journals(Path(tracking.journal_dir)):
        replay(tracking.journal_dir, tracking.uri)


def stored(uri: str, run_id: str | None) -> list[tuple[int, float]]:
    """Every point of one metric as the server holds it; the other metric's must be there once each, too."""
    assert run_id is not None
    client = MlflowStore(uri).client
    points = sorted((m.step, m.value) for m in client.get_metric_history(run_id, "loss"))
    assert sorted(m.step for m in client.get_metric_history(run_id, "lr")) == [step for step, _ in points]
    return points


def logged(stop: int) -> list[tuple[int, float]]:
    return [(step, step / 7) for step in range(stop)]


def test_no_point_is_lost_while_the_server_dies_freezes_and_comes_back(
    mlflow_stack: MlflowServer, radosgw: Radosgw, tmp_path: Path
) -> None:
    tracking = tracking_to(mlflow_stack.uri, tmp_path)
    tracker = begin(tracking)
    log(tracker, 0, 300)
    assert tracker.wait_run_id(120) is not None
    mlflow_stack.kill()
    log(tracker, 300, 1000)  # returns while nobody listens
    tracker.log_text("during the outage", "notes/outage.txt")
    mlflow_stack.start()
    log(tracker, 1000, 1200)
    mlflow_stack.freeze()
    log(tracker, 1200, 2000)  # returns while connections are taken and never answered
    mlflow_stack.thaw()
    log(tracker, 2000, 2300)
    tracker.register_model("through-outages", "s3://b/model", {"latentloom.figure.loss": "0.5"})
    tracker.finish("FINISHED")
    settle(tracking)
    assert stored(mlflow_stack.uri, tracker.run_id) == logged(2300)
    store = MlflowStore(mlflow_stack.uri)
    assert store.client.get_run(tracker.run_id).info.status == "FINISHED"
    assert journals(Path(tracking.journal_dir)) == []
    version = resolve("models:/through-outages@latest", mlflow_stack.uri)
    assert (version.run_id, version.uri) == (tracker.run_id, "s3://b/model")
    # The artifact went through the server into the bucket.
    bucket, _, prefix = mlflow_stack.artifacts_uri.removeprefix("s3://").partition("/")
    listing = radosgw.client().list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
    (key,) = [each["Key"] for each in listing if each["Key"].endswith(f"{tracker.run_id}/artifacts/notes/outage.txt")]
    assert radosgw.client().get_object(Bucket=bucket, Key=key)["Body"].read() == b"during the outage"


def test_a_server_that_is_down_from_start_to_end_gets_everything_by_sync(
    mlflow_stack: MlflowServer, tmp_path: Path
) -> None:
    tracking = tracking_to(mlflow_stack.uri, tmp_path, close_timeout_s=5.0)
    mlflow_stack.kill()
    try:
        tracker = begin(tracking)
        log(tracker, 0, 400)
        tracker.finish("FAILED")  # bounded: the server was never there
        assert tracker.run_id is None
        arguments = [f"tracking.uri={tracking.uri}", f"tracking.journal_dir={tracking.journal_dir}"]
        code, answer, errors = run_job("sync_tracking", *arguments, cwd=tmp_path)
        assert code == 3, errors
        assert "nothing was lost" in errors
    finally:
        mlflow_stack.start()
    code, answer, errors = run_job("sync_tracking", *arguments, cwd=tmp_path)
    assert code == 0, errors
    (run_id,) = answer["details"]["runs"]
    assert stored(mlflow_stack.uri, run_id) == logged(400)
    assert MlflowStore(mlflow_stack.uri).client.get_run(run_id).info.status == "FAILED"


def test_a_stopped_run_goes_on_as_the_same_run_after_the_server_thaws(
    mlflow_stack: MlflowServer, tmp_path: Path
) -> None:
    tracking = tracking_to(mlflow_stack.uri, tmp_path, close_timeout_s=5.0)
    tracker = begin(tracking)
    log(tracker, 0, 100)
    assert tracker.wait_run_id(120) is not None
    mlflow_stack.freeze()
    try:
        log(tracker, 100, 200)
        tracker.finish("KILLED")  # returns although the server stays frozen
    finally:
        mlflow_stack.thaw()
    patient = tracking.model_copy(update={"close_timeout_s": 120.0})
    again = begin(patient, resume_run_id=str(tracker.run_id))
    log(again, 150, 300)  # from the checkpoint on
    again.finish("FINISHED")
    settle(tracking)
    assert again.run_id == tracker.run_id
    assert stored(mlflow_stack.uri, again.run_id) == logged(300)


def test_a_slow_and_failing_connection_costs_no_point(mlflow_stack: MlflowServer, tmp_path: Path) -> None:
    with FaultProxy("127.0.0.1", mlflow_stack.port, seed=3) as proxy:
        tracking = tracking_to(proxy.url, tmp_path)
        tracker = begin(tracking)
        assert tracker.wait_run_id(120) is not None
        proxy.fail("lost_answer", path="log-batch", times=2)
        proxy.fail("status", share=0.2, code=500)
        proxy.fail("slow", share=0.3, delay_s=0.4)
        log(tracker, 0, 3000)
        tracker.log_text("x", "x.txt")
        tracker.finish("FINISHED")
        assert {"slow", "lost_answer", "status"} <= proxy.struck.keys()
        proxy.heal()
        settle(tracking)
    assert stored(mlflow_stack.uri, tracker.run_id) == logged(3000)


def test_a_wrong_password_stops_the_job_at_its_start(
    mlflow_stack: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted-Secret-77")
    with pytest.raises(ConfigError, match="HTTP 401") as caught:
        begin(tracking_to(mlflow_stack.uri, tmp_path))
    assert "planted" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("code", [401, 403])
def test_a_refusal_in_the_middle_loses_nothing(mlflow_stack: MlflowServer, tmp_path: Path, code: int) -> None:
    """A password that was changed, a permission that was taken away: records wait until somebody has mended it."""
    with FaultProxy("127.0.0.1", mlflow_stack.port) as proxy:
        tracking = tracking_to(proxy.url, tmp_path, close_timeout_s=3.0)
        tracker = begin(tracking)
        log(tracker, 0, 50)
        assert tracker.wait_run_id(120) is not None
        proxy.fail("status", code=code)
        log(tracker, 50, 400)
        tracker.finish("FINISHED")
        assert len(journals(Path(tracking.journal_dir))) == 1
        proxy.heal()
        assert replay(tracking.journal_dir, tracking.uri).runs == (tracker.run_id,)
    assert stored(mlflow_stack.uri, tracker.run_id) == logged(400)
    assert MlflowStore(mlflow_stack.uri).client.get_run(tracker.run_id).info.status == "FINISHED"


def test_lineage_and_registry_work_on_the_server(mlflow_stack: MlflowServer, tmp_path: Path) -> None:
    tracking = tracking_to(mlflow_stack.uri, tmp_path)
    ids: dict[str, str] = {}
    for job, parent in (("encode", None), ("train", "encode"), ("sample", "train")):
        tracker = open_tracker(
            tracking, job=job, run_name=job, parents={parent: ids[parent]} if parent is not None else {}
        )
        tracker.log_input(f"in-{job}", f"{job}-in" * 8, f"s3://b/{job}", "input")
        if job == "train":
            tracker.register_model("on-server", str(tmp_path / "model"), {})  # a path only this machine knows
        tracker.finish("FINISHED")
        settle(tracking)
        ids[job] = str(tracker.run_id)
    assert [s.job for s in walk(ids["sample"], tracking.uri)] == ["sample", "train", "encode"]
    assert [s.job for s in descend(ids["encode"], tracking.uri)] == ["encode", "train", "sample"]
    assert resolve("models:/on-server@latest", tracking.uri).uri == str(tmp_path / "model")
    with opened(tracking.uri) as registry:
        (version,) = registry.versions("on-server")
        registry.point(version, "production", {})
    assert resolve("models:/on-server@production", tracking.uri).run_id == ids["train"]
