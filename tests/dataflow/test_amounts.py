"""What processes tell of their work is added up; what they are busy with is told at once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pytest

from pipeline.dataflow import monitor as module
from pipeline.dataflow.monitor import Amounts, Reports
from pipeline.encode.stages import UnitReader
from pipeline.storage.root import Root
from pipeline.store.plan import Work
from tests.support.monitor import LocalMonitor

BLOCK = pa.table({"unit": pa.array([3, 3], pa.int64()), "row": pa.array([4, 5], pa.int64())})


class Clock:
    """The time of `monitor`, which goes on when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


class Counting(LocalMonitor):
    """Counts the calls that arrive, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        whole = super().__getattr__(name)
        whole_call = whole.remote

        def counted(*args: Any) -> Any:
            self.calls[name] += 1
            return whole_call(*args)

        whole.remote = counted
        return whole


def test_amounts_of_a_second_are_one_call_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, sent = Clock(monkeypatch), []
    amounts = Amounts(sent.append)
    for _ in range(40):
        amounts.add({"rows": 64.0, "device_s": 0.09})
        clock.now += 0.125
    assert len(sent) == 5
    amounts.flush()
    amounts.flush()
    assert len(sent) == 6
    assert sum(told["rows"] for told in sent) == 40 * 64
    assert sum(told["device_s"] for told in sent) == pytest.approx(40 * 0.09)


def test_what_comes_from_several_threads_is_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Mapping[str, float]] = []
    monkeypatch.setattr(module, "_SEND_S", 0.0)
    amounts = Amounts(sent.append)

    def work() -> None:
        for _ in range(500):
            amounts.add({"rows": 1.0})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    amounts.flush()
    assert sum(told["rows"] for told in sent) == 2000


def test_a_process_says_at_once_what_it_is_busy_with_and_brings_along_what_it_has_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, monitor = Clock(monkeypatch), Counting()
    reports = Reports(monitor, "encoder")
    for block in range(3):
        with reports.busy(BLOCK):
            assert list(monitor.state._open.values()) == [[(3, 4, 6)]]
            # What was done before is known before these rows can end the process.
            assert monitor.state.totals()[0].get("rows", 0.0) == 10.0 * block
            for _ in range(10):
                reports.add({"rows": 1.0})
                clock.now += 0.001
        assert monitor.state.totals()[0]["rows"] == 10.0 * (block + 1)
        assert not monitor.state._open
    assert monitor.calls == {"begin": 3, "end": 3}


def test_an_error_leaves_the_rows_open_and_what_was_done_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    monitor = Counting()
    reports = Reports(monitor, "encoder")
    with pytest.raises(ValueError, match="planted"), reports.busy(BLOCK):
        reports.add({"rows": 1.0})
        raise ValueError("planted")
    assert monitor.state.totals()[0] == {"rows": 1.0}
    assert monitor.state.deaths() == ([[(3, 4, 6)]], [])


def test_the_reading_of_a_unit_is_told_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    monitor = Counting()

    def blocks(self: UnitReader, work: Work) -> Iterator[pa.Table]:
        yield from [BLOCK] * 5
        raise OSError("planted: the source is gone")

    monkeypatch.setattr(UnitReader, "_blocks", blocks)
    reader = UnitReader(Root("nowhere"), None, {}, monitor=monitor)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="planted"):
        list(reader(Work(0, ((0, None),))))
    assert monitor.calls == {"add": 2}  # the first block's, and the rest
    assert monitor.state.totals()[0]["read_s"] > 0
