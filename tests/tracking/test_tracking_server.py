"""A real MLflow server that is killed, frozen and started again under a running job."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.tracking import tracker as tracker_module
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.delivery import replay
from pipeline.tracking.journal import journals
from pipeline.tracking.store import MlflowStore
from pipeline.tracking.tracker import Tracker, open_tracker
from tests.support.mlflow_server import MlflowServer

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _short_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(tracker_module, "FLUSH_PERIOD_S", 0.05)
    monkeypatch.setattr("pipeline.tracking.flusher.LONGEST_BACKOFF_S", 1.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path / "server")
    yield server
    server.kill()


@pytest.fixture
def remote(server: MlflowServer, tmp_path: Path) -> TrackingConfig:
    return TrackingConfig(uri=server.uri, journal_dir=str(tmp_path / "journal"), close_timeout_s=120.0)


def begin(remote: TrackingConfig, resume: str | None = None) -> Tracker:
    return open_tracker(remote, job="train", run_name="n", resume_run_id=resume, parents={})


def log(tracker: Tracker, start: int, stop: int) -> None:
    for step in range(start, stop):
        tracker.log_metrics({"loss": float(step), "lr": 0.5}, step=step)


def check(server: MlflowServer, run_id: str | None, num_steps: int) -> None:
    """Every step of every metric exactly once."""
    assert run_id is not None
    client = MlflowStore(server.uri).client
    for key in ("loss", "lr"):
        assert sorted(m.step for m in client.get_metric_history(run_id, key)) == list(range(num_steps))


def test_a_server_killed_and_frozen_in_the_middle_costs_no_point(
    server: MlflowServer, remote: TrackingConfig, tmp_path: Path
) -> None:
    server.start()
    tracker = begin(remote)
    log(tracker, 0, 500)
    assert tracker.wait_run_id(120) is not None
    log(tracker, 500, 1000)
    server.kill()
    log(tracker, 1000, 2000)  # returns while nobody listens
    tracker.log_text("during the outage", "note.txt")
    server.start()
    log(tracker, 2000, 2500)
    server.freeze()
    log(tracker, 2500, 3500)  # returns while the server accepts and never answers
    server.thaw()
    log(tracker, 3500, 4000)
    tracker.finish("FINISHED")
    check(server, tracker.run_id, 4000)
    client = MlflowStore(server.uri).client
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert [a.path for a in client.list_artifacts(tracker.run_id)] == ["note.txt"]
    assert [p.read_text() for p in (tmp_path / "server").rglob("note.txt")] == ["during the outage"]
    assert journals(Path(remote.journal_dir)) == []


def test_a_job_that_starts_and_ends_while_the_server_is_down_is_delivered_later(
    server: MlflowServer, remote: TrackingConfig
) -> None:
    tracker = begin(remote)
    log(tracker, 0, 100)
    tracker.finish("FINISHED")  # bounded: the server was never there
    assert tracker.run_id is None
    server.start()
    (run_id,) = replay(remote.journal_dir, remote.uri).runs
    check(server, run_id, 100)
    assert MlflowStore(server.uri).client.get_run(run_id).info.status == "FINISHED"


def test_a_job_ends_in_bounded_time_while_the_server_is_frozen_and_goes_on_later(
    server: MlflowServer, remote: TrackingConfig
) -> None:
    server.start()
    tracker = begin(remote)
    log(tracker, 0, 100)
    assert tracker.wait_run_id(120) is not None
    server.freeze()
    log(tracker, 100, 200)
    tracker.finish("KILLED")  # returns although the server stays frozen
    assert len(journals(Path(remote.journal_dir))) == 1
    server.thaw()
    again = begin(remote, resume=tracker.run_id)
    log(again, 150, 300)  # from the checkpoint on
    again.finish("FINISHED")
    assert again.run_id == tracker.run_id
    check(server, again.run_id, 300)
    assert MlflowStore(server.uri).client.get_run(again.run_id).info.status == "FINISHED"


WORKER = """
import sys
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.tracker import attach_tracker
tracker = attach_tracker(TrackingConfig.model_validate_json(sys.argv[1]), sys.argv[2])
for line in sys.stdin:
    start, stop = map(int, line.split())
    for step in range(start, stop):
        tracker.log_metrics({"loss": float(step)}, step=step)
    print("logged", flush=True)
tracker.finish("FINISHED")
"""


def test_driver_and_worker_log_side_by_side_through_an_outage(server: MlflowServer, remote: TrackingConfig) -> None:
    server.start()
    driver = begin(remote)
    command = [sys.executable, "-c", WORKER, remote.model_dump_json(), str(driver.handle)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        for part, act in enumerate((server.kill, server.start, lambda: None)):
            worker.stdin.write(f"{part * 300} {part * 300 + 300}\n")
            worker.stdin.flush()
            for step in range(part * 300, part * 300 + 300):
                driver.log_metrics({"lr": 0.5}, step=step)
            assert worker.stdout.readline() == "logged\n"  # whatever the server does
            act()
        worker.stdin.close()
        assert worker.wait(timeout=200) == 0
    driver.finish("FINISHED")
    check(server, driver.run_id, 900)
