"""What a process of a stage does around its work: it says what it is busy with, and why it cannot go on.

Runs on the workers, beside the work itself; torch is imported by the work, not here.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import pyarrow as pa
import ray

from pipeline.dataflow.device_faults import device_fault, ends_with_its_device, stopped_by
from pipeline.dataflow.monitor import Rows
from pipeline.errors import PipelineError
from pipeline.store.ledger.rowset import RowSet

_PAUSE_S = 10.0  # before a process that cannot start on its device makes room for another try
_TELL_S = 10.0
T = TypeVar("T")


class Reports:
    """What one process of a stage tells the monitor."""

    def __init__(self, monitor: Any, stage: str) -> None:
        self._monitor, self._stage = monitor, stage
        self._process = f"{os.uname().nodename}-{os.getpid()}-{id(self):x}"
        self._calls = itertools.count()

    def load(self, load: Callable[[], T]) -> Callable[[], T]:
        """`held`, but for what is wrong with this device alone: it does not work, or others fill its memory.

        That must not end the job for those that work elsewhere: such a process says so and ends, Ray starts another,
        and the monitor knows when none can start.
        """
        self._monitor.loading.remote(self._stage, self._process)
        try:
            loaded = load()
        except Exception as error:
            failure = _of_this_device(error, self._stage)
            if failure is not None:
                self._monitor.cannot_start.remote(self._stage, self._process, failure)
                time.sleep(_PAUSE_S)
                raise failure from error
            answer = _fails(error, self._stage)
        else:
            answer = lambda: loaded  # noqa: E731 - the one line says it
        self._monitor.started.remote(self._stage, self._process)
        return answer

    @contextmanager
    def busy(self, block: pa.Table) -> Iterator[None]:
        """Around the work on a block: a process that dies leaves its rows open; one that its device ends, none."""
        call = next(self._calls)
        self._monitor.begin.remote(self._process, call, touched(block))
        with ends_with_its_device(self._stage, self.fault):
            yield
        self._monitor.end.remote(self._process, call)

    def fault(self, fault: str) -> None:
        """This process ends because of its device or of software; returns when the monitor knows."""
        ray.get(self._monitor.fault.remote(self._process, fault), timeout=_TELL_S)

    def add(self, amounts: Mapping[str, float]) -> None:
        """Add to the job's totals."""
        self._monitor.add.remote(amounts)


def held(load: Callable[[], T], stage: str) -> Callable[[], T]:
    """Call `load` now; the answer is a function that returns what it returned, or raises what it raised.

    For the start of an actor: an error raised there reaches the driver as a dead actor without its cause, and Ray
    starts the actor anew; one raised by the first call arrives as what it is.
    """
    try:
        loaded = load()
    except Exception as error:  # noqa: BLE001 - raised by every call
        return _fails(error, stage)
    return lambda: loaded


def _fails(error: Exception, stage: str) -> Callable[[], Any]:
    fault = device_fault(error)
    failure = error if fault is None else stopped_by(fault, f"Starting the {stage}")

    def call() -> Any:
        raise failure

    return call


def touched(block: pa.Table) -> list[Rows]:
    """The rows of a block as (unit, start, stop)."""
    units, rows = block["unit"].to_numpy(), block["row"].to_numpy()
    real = rows >= 0
    return [(u, start, stop) for u, start, stop in RowSet.from_rows(units[real], rows[real]).triples()]


def one_by_one(work: Callable[[pa.Table], pa.Table], block: pa.Table) -> pa.Table:
    """`work` on each row by itself, as one block again: whoever dies meanwhile has died of one row."""
    return pa.concat_tables([work(block.slice(row, 1)) for row in range(len(block))] or [work(block)])


def answer(reference: Any) -> Any:
    """What another actor answers, once it has; raises what it raised."""
    return ray.get(reference)


def _of_this_device(error: Exception, stage: str) -> PipelineError | None:
    """What an error at the start means where it may be the fault of this device alone; else None."""
    from pipeline.dataflow.device_faults import out_of_memory

    if isinstance(error, PipelineError):
        return error if error.__cause__ is not None and out_of_memory(error.__cause__) else None
    fault = device_fault(error)
    return None if fault is None else stopped_by(fault, f"Starting the {stage}")
