"""What the passes of all jobs decide, without Ray: what is left, when to stop, and who is to blame."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from ray.exceptions import ActorDiedError

from pipeline.dataflow import passes as module
from pipeline.dataflow.passes import Execution, Passes
from pipeline.encode.passes import _Encoding
from pipeline.errors import ConfigError, StoppedError
from pipeline.storage.root import Root
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.ledger.state import State, read_state
from pipeline.store.plan import Work
from tests.support.monitor import LocalMonitor
from tests.support.rows import claim, committer, latent_rows, planned_root, rejected_rows

Rows = list[tuple[int, int]]
ENCODER = 1, "encoder"


def asked_for(work: list[Work]) -> set[tuple[int, int]]:
    return {(w.unit, row) for w in work for start, stop in w.ranges for row in range(start, stop or start)}


def run(
    root: Root,
    execute: Callable[[Any, LocalMonitor, set[tuple[int, int]], bool], Rows],
    *,
    retry: RowSet | None = None,
    crash_limit: int = 2,
) -> tuple[State, list[set[tuple[int, int]]]]:
    """Passes whose executions commit what `execute` answers; workers die when that is not all they were asked for."""
    generation, monitor, asked = claim(root), LocalMonitor(), []
    encoding: Any = object.__new__(_Encoding)
    encoding.root, encoding.generation, encoding.retry = root, generation, retry or RowSet.empty()
    encoding._bundles = {}

    def once(work: list[Work], alone: bool) -> None:
        asked.append(asked_for(work))
        rows = execute(generation, monitor, asked[-1], alone)
        if rows:
            committer(root, generation).commit(latent_rows(rows), None, {})
        if not set(rows) >= asked[-1]:
            raise ActorDiedError

    def quarantine(rows: Rows) -> None:
        committer(root, generation).commit(latent_rows([]), rejected_rows(rows, "quarantined"), {})

    passes = Passes(
        monitor=monitor,
        generation=generation,
        look=encoding._state_and_gaps,
        prepare=lambda work, state, alone, number: Execution({"encoder": 1}, partial(once, work, alone)),
        quarantine=quarantine,
        units_per_execution=100,
        crash_limit=crash_limit,
        doing="Encoding",
        on_clean_pass=encoding._retried,
    )
    return passes.run(), asked


class Halting:
    """Executions of one unit each that end when they are let go; `begun` says which did, by unit."""

    def __init__(self, root: Root, drivers: int = 1) -> None:
        self.generation, self.monitor, self.root = claim(root), LocalMonitor(), root
        self.begun: list[int] = []
        self.go = defaultdict[int, threading.Event](threading.Event)
        encoding: Any = object.__new__(_Encoding)
        encoding.root, encoding.generation, encoding.retry = root, self.generation, RowSet.empty()
        encoding._bundles = {}
        self.passes = Passes(
            monitor=self.monitor,
            generation=self.generation,
            look=encoding._state_and_gaps,
            prepare=self.prepare,
            quarantine=lambda rows: None,
            units_per_execution=1,
            crash_limit=0,
            doing="Encoding",
            drivers=drivers,
        )

    def prepare(self, work: list[Work], state: State, alone: bool, number: int) -> Execution:
        (unit,) = (w.unit for w in work)
        assert number == unit + 1

        def run() -> None:
            self.begun.append(unit)
            assert self.go[unit].wait(30)
            committer(self.root, self.generation).commit(latent_rows([(unit, 0), (unit, 1)]), None, {})

        return Execution({"encoder": 1}, run)

    def tail(self, unit: int) -> None:
        """An encoder has begun on all that the execution has."""
        self.monitor.state.begin((unit + 1, "encoder"), "p", 0, [(unit, 0, 2)])

    def begin(self, *units: int) -> None:
        """Wait until executions of these have begun, and see that no other does."""
        until = time.monotonic() + 30
        while self.begun != list(units):
            assert time.monotonic() < until, self.begun
            time.sleep(0.01)
        time.sleep(3 * module._TAIL_POLL_S)
        assert self.begun == list(units)


@pytest.fixture
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    # What runs elsewhere needs a cluster (tests/dataflow/test_workers.py).
    monkeypatch.setattr(module, "run_elsewhere", lambda execute, drivers: module.run_execution(execute))
    monkeypatch.setattr(module, "_TAIL_POLL_S", 0.02)


def test_an_execution_begins_in_the_tail_of_the_one_before_and_no_third_beside_a_straggler(
    tmp_path: Path, local_ray: None, quick_polls: None
) -> None:
    job = Halting(planned_root(str(tmp_path / "data"), units=4, rows=2))
    with ThreadPoolExecutor(1) as driver:
        done = driver.submit(job.passes.run)
        job.begin(0)
        job.tail(0)
        job.begin(0, 1)
        job.tail(1)
        job.begin(0, 1)  # the first has not ended
        job.go[1].set()
        job.begin(0, 1, 2)
        for unit in (0, 2, 3):
            job.go[unit].set()
        assert done.result(30).num_stored == 8
    assert job.begun == [0, 1, 2, 3]
    assert job.monitor.state.tails() == []


def test_several_drivers_run_as_many_executions(tmp_path: Path, local_ray: None, quick_polls: None) -> None:
    job = Halting(planned_root(str(tmp_path / "data"), units=5, rows=2), drivers=2)
    with ThreadPoolExecutor(1) as driver:
        done = driver.submit(job.passes.run)
        job.begin(0, 1)
        job.tail(1)
        job.begin(0, 1, 2)
        for unit in range(5):
            job.go[unit].set()
        assert done.result(30).num_stored == 10


def test_what_one_execution_raises_does_not_wait_for_the_other(
    tmp_path: Path, local_ray: None, quick_polls: None
) -> None:
    job = Halting(planned_root(str(tmp_path / "data"), units=2, rows=2), drivers=2)
    usual = job.prepare

    def prepare(work: list[Work], state: State, alone: bool, number: int) -> Execution:
        def run() -> None:
            raise ConfigError("no such codec")

        return usual(work, state, alone, number) if work[0].unit == 0 else Execution({}, run)

    job.passes.prepare = prepare
    with pytest.raises(ConfigError, match="no such codec"):
        job.passes.run()
    assert job.begun == [0]
    job.go[0].set()


def rejected_root(path: Path) -> tuple[Root, RowSet]:
    """Two units of three rows, three of which an earlier generation has rejected."""
    root = planned_root(str(path / "data"), units=2, rows=3)
    bad = [(0, 0), (0, 1), (1, 2)]
    writer = committer(root, claim(root))
    writer.commit(latent_rows([(0, 2), (1, 0), (1, 1)]), rejected_rows(bad, "truncated"), {})
    return root, read_state(root).retryable(["truncated"])


def planned(*executions: Rows) -> Callable[..., Rows]:
    left = list(executions)
    return lambda generation, monitor, asked, alone: left.pop(0) if left else []


def test_rejects_to_retry_stay_open_until_this_run_has_settled_them(tmp_path: Path, local_ray: None) -> None:
    root, retry = rejected_root(tmp_path)
    state, asked = run(root, planned([(0, 0)], [(0, 1), (1, 2)]), retry=retry)
    assert asked == [{(0, 0), (0, 1), (1, 2)}, {(0, 1), (1, 2)}]
    assert (state.num_stored, state.num_rejected) == (6, 0)


def test_rejects_that_a_source_no_longer_yields_stay_what_they_were(
    tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tar that is gone gives no row to try again: the run that has asked for it ends all the same."""
    root, retry = rejected_root(tmp_path)
    monkeypatch.setattr(module, "run_execution", finished)
    state, asked = run(root, planned([(0, 0)]), retry=retry)
    assert len(asked) == 1
    assert (state.num_stored, state.num_rejected) == (4, 2)


def test_rows_whose_source_has_changed_since_it_was_listed_stay_open(
    tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody dies, and no row comes: the next run lists anew, so this one ends and says so."""
    root = planned_root(str(tmp_path / "data"), units=1, rows=2)
    monkeypatch.setattr(module, "run_execution", finished)
    with pytest.raises(StoppedError, match="The source has changed; 1 rows are left"):
        run(root, planned([(0, 0)]), crash_limit=20)
    assert read_state(root).num_stored == 1


def finished(execute: Callable[[], None]) -> None:
    """An execution that ended as it should, whatever it committed."""
    with contextlib.suppress(ActorDiedError):
        execute()


def test_rejects_that_cannot_be_retried_stop_the_run(tmp_path: Path, local_ray: None) -> None:
    root, retry = rejected_root(tmp_path)
    with pytest.raises(StoppedError, match="without progress; 2 rows are left; the last time: ") as caught:
        run(root, planned([(0, 0)]), retry=retry)
    assert isinstance(caught.value.__cause__, ActorDiedError)
    assert read_state(root).num_rejected == 2


def test_a_row_that_kills_its_process_alone_is_quarantined_and_nothing_else(tmp_path: Path, local_ray: None) -> None:
    """Blocks of a unit first, then row by row: three processes die on the block, three on the row."""
    root = planned_root(str(tmp_path / "data"), units=3, rows=3)
    poison = (1, 1)

    def execute(generation: Any, monitor: LocalMonitor, asked: set[tuple[int, int]], alone: bool) -> Rows:
        blocks = [{row} for row in asked] if alone else [{r for r in asked if r[0] == u} for u in range(3)]
        done: set[tuple[int, int]] = set()
        for block in filter(None, blocks):
            if poison not in block:
                done |= block
                continue
            unit, rows = next(iter(block))[0], sorted(row for _, row in block)
            for process in range(3):
                monitor.state.begin(ENCODER, f"p{process}", 0, [(unit, rows[0], rows[-1] + 1)])
        return sorted(done)

    state, asked = run(root, execute)
    assert (state.num_stored, state.num_rejected) == (8, 1)
    assert state.rejects["quarantined"] == RowSet.from_rows(np.array([1]), np.array([1]))
    assert Counter(row for rows in asked for row in rows)[poison] == 2


def test_a_fault_of_the_device_blames_no_row_and_stops_the_run_with_its_words(
    tmp_path: Path, local_ray: None
) -> None:
    root = planned_root(str(tmp_path / "data"), units=2, rows=3)

    def execute(generation: Any, monitor: LocalMonitor, asked: set[tuple[int, int]], alone: bool) -> Rows:
        for process in range(3):
            monitor.state.begin(ENCODER, f"p{process}", 0, [(0, 0, 1)])
            monitor.state.fault(f"p{process}", "RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED")
        return []

    with pytest.raises(StoppedError, match=r"Encoding failed on its device: .*CUBLAS_STATUS_EXECUTION_FAILED"):
        run(root, execute, crash_limit=20)
    assert read_state(root).num_rejected == 0


def test_a_compiler_that_fails_is_a_wrong_configuration(tmp_path: Path, local_ray: None) -> None:
    root = planned_root(str(tmp_path / "data"), units=1, rows=2)

    def execute(generation: Any, monitor: LocalMonitor, asked: set[tuple[int, int]], alone: bool) -> Rows:
        monitor.state.fault("p", "InductorError: CppCompileError: C++ compile error")
        return []

    with pytest.raises(ConfigError, match="failed in a compiler"):
        run(root, execute, crash_limit=20)


@pytest.mark.parametrize("task", ["read", "write"])
def test_an_end_that_lands_in_a_callback_is_not_printed(
    task: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Ends:
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def __del__(self) -> None:
            raise self.error

    def ended(*_: Any) -> list[pa.Table]:
        Ends(KeyboardInterrupt())
        Ends(ValueError("told"))
        return []

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    if task == "read":
        work = [Work(0, ((0, None),))]
        [read] = module.UnitSource("units", work, lambda _: ended, 1).get_read_tasks(1)
        assert list(read()) == []
    else:
        table = pa.table({"row": [1]})
        assert module.LedgerSink("rows", ended, 1).write([table], None) == 1  # type: ignore[arg-type]
    errors = capfd.readouterr().err
    assert "KeyboardInterrupt" not in errors
    assert "ValueError: told" in errors
