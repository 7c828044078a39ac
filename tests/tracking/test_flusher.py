"""The flusher against a store that blocks, fails and comes back; no clock proves a point here, only structure."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.tracking import flusher as flusher_module
from pipeline.tracking.delivery import replay_orphans
from pipeline.tracking.flusher import Flusher
from pipeline.tracking.journal import Header, JournalReader, JournalWriter, gate, journals
from pipeline.tracking.store import TrackingUnavailable
from tests.tracking.fake_tracking_store import FakeStore

Build = Callable[..., Header]
PATIENCE_S = 30.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flusher_module, "FIRST_BACKOFF_S", 0.01)


def open_flusher(
    folder: Path, header: Header, store: FakeStore | Callable[[], FakeStore], rest_s: float = 0.0
) -> tuple[JournalWriter, Flusher]:
    writer = JournalWriter(folder, header)
    flusher = Flusher(writer, store if callable(store) else lambda: store, period_s=0.01, rest_s=rest_s)
    flusher.start()
    return writer, flusher


def metric(step: int, time_ms: int = 1) -> dict[str, object]:
    return {"kind": "metrics", "t": time_ms, "step": step, "values": {"loss": 0.5}}


def steps(store: FakeStore) -> list[int]:
    return sorted(p.step for p in store.only_run().points)


class Outage:
    """A fault that raises while `down`, and tells when it was met."""

    def __init__(self) -> None:
        self.down, self.met = True, threading.Event()

    def __call__(self, call: str) -> None:
        if self.down:
            self.met.set()
            raise TrackingUnavailable("connection refused")


def test_records_arrive_and_the_journal_is_gone_after_closing(tmp_path: Path, header: Build) -> None:
    store = FakeStore()
    writer, flusher = open_flusher(tmp_path, header(), store)
    for step in range(5):
        writer.append(metric(step))
    assert flusher.wait_connected(PATIENCE_S)
    assert flusher.run_id == "run0"
    assert flusher.close(PATIENCE_S) == 0
    assert steps(store) == list(range(5))
    assert journals(tmp_path) == []


def test_a_rest_at_the_start_ends_when_somebody_waits_or_the_end_comes(tmp_path: Path, header: Build) -> None:
    store = FakeStore()
    writer, flusher = open_flusher(tmp_path, header(), store, rest_s=3600.0)
    assert flusher.wait_connected(PATIENCE_S)
    assert flusher.close(PATIENCE_S) == 0
    writer, flusher = open_flusher(tmp_path, header(), store := FakeStore(), rest_s=3600.0)
    writer.append(metric(0))
    assert not store.runs
    assert flusher.close(PATIENCE_S) == 0
    assert steps(store) == [0]


def test_an_outage_delays_records_and_loses_none(
    tmp_path: Path, header: Build, caplog: pytest.LogCaptureFixture
) -> None:
    outage = Outage()
    store = FakeStore(outage)
    writer, flusher = open_flusher(tmp_path, header(), store)
    writer.append(metric(0))
    assert outage.met.wait(PATIENCE_S)
    writer.append(metric(1))
    outage.down = False
    assert flusher.wait_connected(PATIENCE_S)
    outage.met.clear()
    outage.down = True
    writer.append(metric(2))
    assert outage.met.wait(PATIENCE_S)
    outage.down = False
    assert flusher.close(PATIENCE_S) == 0
    assert steps(store) == [0, 1, 2]
    assert "tracking records wait in" in caplog.text


def test_a_store_that_never_answers_blocks_nobody(tmp_path: Path, header: Build) -> None:
    """The store's call does not return until the test lets it: all writes and the close come back before that."""
    release, entered = threading.Event(), threading.Event()

    def fault(call: str) -> None:
        entered.set()
        release.wait(PATIENCE_S)

    store = FakeStore(fault)
    writer, flusher = open_flusher(tmp_path, header(), store)
    assert entered.wait(PATIENCE_S)
    for step in range(1000):
        writer.append(metric(step))
    assert flusher.close(0.05) > 0
    assert not release.is_set()
    assert replay_orphans(tmp_path, FakeStore(), None).in_use == 1  # the thread still holds it
    release.set()
    flusher._thread.join(PATIENCE_S)
    if journals(tmp_path):
        replay_orphans(tmp_path, store, None)
    assert steps(store) == list(range(1000))


def test_an_earlier_attempt_that_is_inside_a_request_goes_first(tmp_path: Path, header: Build) -> None:
    """Else what it delivers when the store goes on would be there twice, logged again by the resumed run."""
    release, entered = threading.Event(), threading.Event()

    def fault(call: str) -> None:
        if call == "log_batch" and not entered.is_set():
            entered.set()
            release.wait(PATIENCE_S)

    store = FakeStore(fault)
    first, first_flusher = open_flusher(tmp_path, header(1), store)
    for step in range(6):
        first.append(metric(step))
    assert entered.wait(PATIENCE_S)
    assert first_flusher.close(0.05) > 0
    second, second_flusher = open_flusher(tmp_path, header(2), store)  # the same run, resumed
    for step in range(3, 9):
        second.append(metric(step, time_ms=2))
    assert not second_flusher.wait_connected(0.3)
    release.set()
    assert second_flusher.close(PATIENCE_S) == 0
    first_flusher._thread.join(PATIENCE_S)
    assert steps(store) == list(range(9))


def test_what_a_dead_store_did_not_take_is_sent_by_the_next_start(tmp_path: Path, header: Build) -> None:
    outage = Outage()
    store = FakeStore(outage)
    writer, flusher = open_flusher(tmp_path, header(1), store)
    for step in range(6):
        writer.append(metric(step))
    writer.append({"kind": "status", "status": "FAILED", "t": 1})
    assert flusher.close(PATIENCE_S) > 0
    assert len(journals(tmp_path)) == 1
    outage.down = False
    writer, flusher = open_flusher(tmp_path, header(2), store)  # the same run, resumed
    for step in range(3, 9):
        writer.append(metric(step, time_ms=2))
    assert flusher.close(PATIENCE_S) == 0
    assert steps(store) == list(range(9))
    assert journals(tmp_path) == []
    assert store.only_run().status == "RUNNING"


def test_journals_of_other_runs_are_sent_after_ones_own(tmp_path: Path, header: Build) -> None:
    other = JournalWriter(tmp_path, header(1, run_key="other"))
    other.append(metric(77))
    other.close()
    store = FakeStore()
    done = threading.Event()
    store._fault = lambda call: done.set() if call == "set_status" else None  # type: ignore[assignment]
    _, flusher = open_flusher(tmp_path, header(2), store)
    assert done.wait(PATIENCE_S)
    assert flusher.close(PATIENCE_S) == 0
    mine, others = store.runs["run0"], store.runs["run1"]
    assert mine.header.run_key == "k1"
    assert [p.step for p in others.points] == [77]
    assert (mine.status, others.status) == ("RUNNING", "KILLED")


def test_a_store_that_cannot_even_be_built_is_tried_again(tmp_path: Path, header: Build) -> None:
    store, attempts = FakeStore(), []

    def make() -> FakeStore:
        attempts.append(1)
        if len(attempts) < 3:
            raise RuntimeError("no module today")
        return store

    writer, flusher = open_flusher(tmp_path, header(), make)
    writer.append(metric(1))
    assert flusher.wait_connected(PATIENCE_S)
    assert flusher.close(PATIENCE_S) == 0
    assert steps(store) == [1]


def test_the_last_round_waits_for_its_turn_at_the_gate(tmp_path: Path, header: Build) -> None:
    store = FakeStore()
    with gate(tmp_path) as mine:
        assert mine
        writer, flusher = open_flusher(tmp_path, header(), store)
        writer.append(metric(1))
        assert flusher.close(0.1) > 0
        assert store.runs == {}
    flusher._thread.join(PATIENCE_S)
    assert steps(store) == [1]


def test_two_processes_of_one_run_send_side_by_side(tmp_path: Path, header: Build) -> None:
    store = FakeStore()
    driver, driver_flusher = open_flusher(tmp_path, header(1), store)
    worker, worker_flusher = open_flusher(tmp_path, header(role="attached"), store)
    for step in range(50):
        driver.append({"kind": "metrics", "t": 1, "step": step, "values": {"rows": 1.0}})
        worker.append(metric(step))
    assert worker_flusher.wait_connected(PATIENCE_S)
    assert driver_flusher.close(PATIENCE_S) == 0
    assert worker_flusher.close(PATIENCE_S) == 0
    points = store.only_run().points
    assert sorted((p.key, p.step) for p in points) == sorted((k, i) for k in ("loss", "rows") for i in range(50))


def test_an_attached_process_that_ends_before_its_run_is_made_waits_for_it(tmp_path: Path, header: Build) -> None:
    """A short worker is through before a busy driver has made the run; its machine may not outlive it."""
    store = FakeStore()

    def fault(call: str) -> None:
        if call == "find_run" and store.calls.count("find_run") == 10:
            store.create_run(header(1))

    store._fault = fault
    worker, flusher = open_flusher(tmp_path, header(role="attached"), store)
    worker.append(metric(1))
    assert flusher.close(PATIENCE_S) == 0
    assert steps(store) == [1]
    assert journals(tmp_path) == []


def test_an_attached_process_does_not_wait_longer_than_it_was_told(tmp_path: Path, header: Build) -> None:
    worker, flusher = open_flusher(tmp_path, header(role="attached"), FakeStore())
    worker.append(metric(1))
    assert flusher.close(0.2) > 0
    flusher._thread.join(PATIENCE_S)
    assert not flusher._thread.is_alive()
    assert len(journals(tmp_path)) == 1


def test_refused_records_keep_their_journal(tmp_path: Path, header: Build) -> None:
    store = FakeStore(refused=frozenset({"loss"}))
    writer, flusher = open_flusher(tmp_path, header(), store)
    writer.append(metric(1))
    assert flusher.close(PATIENCE_S) == 0
    (kept,) = tmp_path.glob("*.refused")
    assert JournalReader(kept).header() == header()
