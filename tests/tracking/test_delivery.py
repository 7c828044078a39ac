from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.tracking.delivery import Delivery, replay_orphans
from pipeline.tracking.journal import Header, JournalReader, JournalWriter
from pipeline.tracking.store import ATTEMPT_TAG, RunMissing, TrackingUnavailable
from tests.tracking.fake_tracking_store import FakeStore, build_header

Build = Callable[..., Header]


def write(folder: Path, header: Header, *records: dict[str, object]) -> Path:
    """The journal of a process that has died."""
    writer = JournalWriter(folder, header)
    for record in records:
        writer.append(record)
    writer.close()
    return writer.path


def metrics(step: int, time_ms: int = 5, **values: float | str) -> dict[str, object]:
    return {"kind": "metrics", "t": time_ms, "step": step, "values": values}


def status(name: str) -> dict[str, object]:
    return {"kind": "status", "status": name, "t": 9}


def deliver(store: FakeStore, path: Path, *, live: bool = False) -> Delivery:
    delivery = Delivery(store, JournalReader(path), live=live)
    delivery.connect()
    while delivery.send_next():
        pass
    return delivery


def steps(store: FakeStore, key: str = "loss") -> list[int]:
    return sorted(p.step for p in store.only_run().points if p.key == key)


def test_everything_arrives_and_points_travel_in_batches(tmp_path: Path, header: Build) -> None:
    store = FakeStore()
    records = [metrics(i, loss=i, lr="nan") for i in range(1200)]
    deliver(store, write(tmp_path, header(), {"kind": "params", "values": {"p": "1"}}, *records, status("FINISHED")))
    run = store.only_run()
    assert steps(store) == list(range(1200))
    assert (run.params, run.status) == ({"p": "1"}, "FINISHED")
    assert store.calls.count("log_batch") < 10


def test_a_record_with_more_entries_than_a_call_may_have_is_split(tmp_path: Path, header: Build) -> None:
    store = FakeStore()
    many = {f"m{i}": float(i) for i in range(2500)}
    tags = {"kind": "tags", "values": {f"t{i}": "x" for i in range(250)}}
    params = {"kind": "params", "values": {f"p{i}": "x" for i in range(250)}}
    deliver(store, write(tmp_path, header(), metrics(0, **many), tags, params))
    run = store.only_run()
    assert (len(run.points), len(run.params)) == (2500, 250)
    assert tags["values"].items() <= run.tags.items()


def test_one_bad_value_costs_only_itself(tmp_path: Path, header: Build, caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore(refused=frozenset({"bad"}))
    path = write(tmp_path, header(), *[metrics(i, loss=1.0) for i in range(50)], metrics(50, bad=1.0, loss=2.0))
    deliver(store, path)
    assert steps(store) == list(range(51))
    assert JournalReader(path).confirmed.refused == 1
    assert "refuses Point(key='bad'" in caplog.text


def test_unusable_records_do_not_stop_what_follows(tmp_path: Path, header: Build) -> None:
    store = FakeStore()
    broken = [
        {"kind": "metrics", "step": 1},
        {"kind": "params", "values": 3},
        {"kind": "artifact", "file": "000001/gone.png", "folder": ""},
        {"kind": "from-a-later-version"},
        {"kind": "input", "name": "x"},
    ]
    path = write(tmp_path, header(), *broken, metrics(2, loss=1.0))
    deliver(store, path)
    assert steps(store) == [2]
    assert JournalReader(path).confirmed.refused == 3


def test_a_resumed_attempt_does_not_double_the_steps_it_repeats(tmp_path: Path, header: Build) -> None:
    store = FakeStore()
    first = [metrics(i, time_ms=10 + i, loss=i) for i in range(1, 11)]
    deliver(store, write(tmp_path, header(1), *first))
    second = [metrics(i, time_ms=100 + i, loss=i) for i in range(6, 15)]
    again = deliver(store, write(tmp_path, header(2), *second), live=True)
    assert steps(store) == list(range(1, 15))
    assert again.num_skipped == 5


def test_steps_missing_between_delivered_ones_are_filled(tmp_path: Path, header: Build) -> None:
    """The journal of attempt 1 was on a node that came back late: 8 is new, 9 and 10 were repeated by attempt 2."""
    store = FakeStore()
    deliver(store, write(tmp_path, header(1), *[metrics(i, loss=i) for i in range(1, 8)]))
    deliver(store, write(tmp_path, header(2), *[metrics(i, time_ms=99, loss=i) for i in (9, 10, 11)]), live=True)
    deliver(store, write(tmp_path, header(1), *[metrics(i, loss=i) for i in (8, 9, 10)]))
    assert steps(store) == list(range(1, 12))


def test_a_param_is_logged_once(tmp_path: Path, header: Build, caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore()
    deliver(store, write(tmp_path, header(1), {"kind": "params", "values": {"lr": "0.1"}}))
    path = write(tmp_path, header(2), {"kind": "params", "values": {"lr": "0.2", "new": "1"}})
    deliver(store, path, live=True)
    assert JournalReader(path).confirmed.refused == 0
    assert store.only_run().params == {"lr": "0.1", "new": "1"}
    assert "param lr" in caplog.text


def test_a_creation_whose_answer_was_lost_is_not_repeated(tmp_path: Path, header: Build) -> None:
    lost = iter([True])

    def fault(call: str) -> None:
        if call == "create_run: answer" and next(lost, False):
            raise TrackingUnavailable("connection reset")

    store = FakeStore(fault)
    path = write(tmp_path, header(), metrics(1, loss=1.0))
    with pytest.raises(TrackingUnavailable, match="reset"):
        deliver(store, path)
    deliver(store, path)
    assert len(store.runs) == 1
    assert steps(store) == [1]


def test_an_attached_journal_waits_for_its_owner_to_make_the_run(tmp_path: Path, header: Build) -> None:
    store = FakeStore()
    attached = write(tmp_path, header(role="attached"), metrics(1, loss=1.0))
    with pytest.raises(RunMissing, match="not been made"):
        deliver(store, attached)
    assert replay_orphans(tmp_path, store, None).waiting == 1
    write(tmp_path, header(9))
    report = replay_orphans(tmp_path, store, None)
    assert (report.sent, report.waiting) == (2, 0)
    assert steps(store) == [1]


def test_the_run_of_a_killed_process_ends_killed(tmp_path: Path, header: Build) -> None:
    store = FakeStore()
    write(tmp_path, header(), metrics(1, loss=1.0))
    assert replay_orphans(tmp_path, store, "http://server").sent == 1
    assert store.only_run().status == "KILLED"
    assert list(tmp_path.glob("*.jsonl")) == []


def test_a_dead_attempt_does_not_end_the_run_of_a_newer_one(tmp_path: Path, header: Build) -> None:
    store = FakeStore()
    left = write(tmp_path / "old", header(1), metrics(1, loss=1.0))
    failed = write(tmp_path / "old", header(1), metrics(2, loss=1.0), status("FAILED"))
    deliver(store, write(tmp_path / "new", header(2)), live=True)
    replay_orphans(left.parent, store, None)
    assert not failed.exists()
    assert store.only_run().status == "RUNNING"
    assert steps(store) == [1, 2]
    assert store.only_run().tags[ATTEMPT_TAG] == header(2).attempt


def test_a_resumed_run_is_running_again_and_then_ends_as_its_last_attempt(tmp_path: Path, header: Build) -> None:
    store = FakeStore()
    deliver(store, write(tmp_path, header(1), status("FAILED")))
    assert store.only_run().status == "FAILED"
    path = write(tmp_path, header(2), metrics(1, loss=1.0), status("FINISHED"))
    delivery = Delivery(store, JournalReader(path), live=True)
    delivery.connect()
    assert store.only_run().status == "RUNNING"
    while delivery.send_next():
        pass
    assert store.only_run().status == "FINISHED"


def test_journals_of_another_server_or_version_are_left_alone(tmp_path: Path, header: Build) -> None:
    store = FakeStore()
    path = write(tmp_path, header(), metrics(1, loss=1.0))
    (tmp_path / "0-owner-odd.jsonl").write_text("what is this\n")
    report = replay_orphans(tmp_path, store, "http://elsewhere")
    assert (report.other_server, report.unreadable, report.sent) == (1, 1, 0)
    assert path.exists()
    assert store.runs == {}
    with pytest.raises(ValueError, match="no journal of this version"):
        Delivery(store, JournalReader(tmp_path / "0-owner-odd.jsonl"), live=False)
    with pytest.raises(ValueError, match="not connected"):
        _ = Delivery(store, JournalReader(path), live=False).run_id


@pytest.mark.integration
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rate=st.floats(0.05, 0.6))
def test_whatever_fails_and_whenever_each_point_arrives_exactly_once(
    tmp_path_factory, seed: int, rate: float
) -> None:
    """Two attempts overlap in steps; each call may fail before or after its effect; the sender restarts each time."""
    dice = random.Random(seed)

    def fault(call: str) -> None:
        if dice.random() < rate:
            raise TrackingUnavailable(call)

    folder, store = tmp_path_factory.mktemp("faults"), FakeStore(fault)
    note = {"kind": "tags", "values": {"note": "x"}}
    one = [metrics(i, time_ms=i, loss=i, lr=1.0) for i in range(1, 40)]
    two = [metrics(i, time_ms=1000 + i, loss=i, lr=1.0) for i in range(25, 60)]
    for number, records in ((1, one), (2, two)):
        write(folder, build_header(number), *records[:20], note, status("FAILED"), *records[20:])
        for _ in range(10_000):
            try:
                if replay_orphans(folder, store, None).sent:
                    break
            except TrackingUnavailable:
                continue
    points = store.only_run().points
    assert sorted((p.key, p.step) for p in points) == sorted((k, i) for k in ("loss", "lr") for i in range(1, 60))
    assert list(folder.glob("*.jsonl")) == []
