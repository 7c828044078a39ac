"""What actors say of themselves while they work, and the thread that shows it and watches over the job."""

from __future__ import annotations

import gc
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.dataflow.cluster import Gauges, LocalRaylets
from pipeline.dataflow.device_faults import device_fault, ends_with_its_device, out_of_memory, stopped_by
from pipeline.errors import PipelineError, StoppedError
from pipeline.progress import Progress
from pipeline.store.ledger.rowset import RowSet

_POLL_S = 0.5
_PICTURES = 32
_EXAMPLES = 6  # of rows that were left out for one reason
_NOTHING: Mapping[str, float] = {}
Rows = tuple[int, int, int]  # of a unit: (unit, first row, last row + 1)
Stage = tuple[int, str]  # of one execution: its number, the stage's name


@dataclass
class _Starts:
    """How the processes of one stage have started in one execution, and which units they were given."""

    expected: int
    units: set[int] = field(default_factory=set)
    begun: int = 0
    loading: set[str] = field(default_factory=set)
    started: int = 0
    failures: list[PipelineError] = field(default_factory=list)

    def hopeless(self, stage: str) -> PipelineError | None:
        """Why none will ever start, once each has tried and one more; None as long as one has, or may."""
        if self.started:
            return None
        if len(self.failures) > self.expected and not self.loading:
            return self.failures[-1]
        silent = self.begun - len(self.failures)
        if silent > 3 * self.expected + 2:
            return StoppedError(
                f"Processes of the stage {stage!r} died {silent - 1} times while they loaded, without a word",
                rule="what was committed is kept",
                next_step="see Ray's worker logs and the machine's memory, then run the same command again",
            )
        return None


class MonitorState:
    """What actors report while they work: for display and for judging why they die, never for truth."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._meters: dict[str, Any] = {}
        self._gauges = Gauges(job)
        self._done: dict[str, float] = {}
        self._open: dict[tuple[str, int], list[Rows]] = {}
        self._faults: list[str] = []
        self._starts: dict[Stage, _Starts] = {}
        self._units: dict[int, int] = {}
        self._pictures: list[tuple[str, bytes]] = []
        self._left_out: dict[str, list[tuple[str, str, bytes | None]]] = {}

    def picture(self, caption: str, data: bytes) -> None:
        """Keep an encoded image for people to look at; beyond the first few none is kept."""
        if len(self._pictures) < _PICTURES:
            self._pictures.append((caption, data))

    def pictures(self) -> list[tuple[str, bytes]]:
        """Those that were kept, with their captions."""
        return self._pictures

    def leave_out(self, reason: str, key: str, message: str, data: bytes | None) -> None:
        """Keep a row that was left out, with an encoded image of it where there is one; of each reason the first."""
        examples = self._left_out.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append((key, message, data))

    def left_out(self) -> dict[str, list[tuple[str, str, bytes | None]]]:
        """(key, message, image) of those that were kept, by reason."""
        return self._left_out

    def expect(self, execution: int, actors: Mapping[str, int], units: int) -> None:
        """An execution begins, of so many units: so many processes of each stage are to start."""
        self._starts |= {(execution, stage): _Starts(count) for stage, count in actors.items()}
        self._units[execution] = units

    def ended(self, execution: int) -> None:
        """It is over: nothing more is expected of it."""
        self._units.pop(execution, None)
        self._starts = {stage: starts for stage, starts in self._starts.items() if stage[0] != execution}

    def tails(self) -> list[int]:
        """The executions of which some stage has begun on every unit: its processes have ever less to do.

        A unit without rows is never begun on: an execution that has one has no tail that is seen.
        """
        most: dict[int, int] = {}
        for (execution, _), starts in self._starts.items():
            most[execution] = max(most.get(execution, 0), len(starts.units))
        return [execution for execution, units in self._units.items() if most.get(execution, 0) >= units]

    def loading(self, stage: Stage, process: str) -> None:
        """A process begins to load what it works with."""
        starts = self._starts.setdefault(stage, _Starts(1))
        starts.begun += 1
        starts.loading.add(process)

    def started(self, stage: Stage, process: str) -> None:
        """It has, or met an error that its first call will raise."""
        starts = self._starts.setdefault(stage, _Starts(1))
        starts.started += 1
        starts.loading.discard(process)

    def cannot_start(self, stage: Stage, process: str, error: PipelineError) -> None:
        """It could not, on the device that it was given; another process may, on another."""
        starts = self._starts.setdefault(stage, _Starts(1))
        starts.failures.append(error)
        starts.loading.discard(process)

    def begin(
        self, stage: Stage, process: str, call: int, rows: list[Rows], amounts: Mapping[str, float] = _NOTHING
    ) -> None:
        """A process starts on some rows; amounts: what it has done before and not told."""
        self._open[process, call] = rows
        if stage in self._starts:
            self._starts[stage].units.update(unit for unit, _, _ in rows)
        self.add(amounts)

    def end(self, process: str, call: int, amounts: Mapping[str, float] = _NOTHING) -> None:
        """It came back from them; amounts: what it has done and not told."""
        self._open.pop((process, call), None)
        self.add(amounts)

    def fault(self, process: str, fault: str) -> None:
        """A process ends because of its device or of software: the rows it was busy with are not to blame."""
        self._faults.append(fault)
        self._open = {key: rows for key, rows in self._open.items() if key[0] != process}

    def add(self, amounts: Mapping[str, float]) -> None:
        """Add to named totals, which are also Ray metrics: `latentloom_<job>_<name>`, a counter each.

        A node shows counters of ended jobs, too; the gauge `latentloom_<job>_active` goes with its job.
        """
        from ray.util.metrics import Counter

        self._gauges({"active": 1.0})
        for name, amount in amounts.items():
            self._done[name] = self._done.get(name, 0.0) + amount
            if name not in self._meters:
                self._meters[name] = Counter(
                    f"latentloom_{self._job}_{name}", description=f"{name} of a {self._job} job"
                )
            if amount > 0:
                self._meters[name].inc(amount)

    def show(self, figures: Mapping[str, float]) -> None:
        """Set named totals to their newest values, which are also Ray metrics: a gauge each."""
        self._gauges(figures)
        self._done.update(figures)

    def totals(self) -> tuple[dict[str, float], PipelineError | None]:
        """The named totals, and why the execution cannot go on: no process of some stage starts."""
        hopeless = (starts.hopeless(stage) for (_, stage), starts in self._starts.items())
        return dict(self._done), next((error for error in hopeless if error is not None), None)

    def deaths(self) -> tuple[list[list[Rows]], list[str]]:
        """(rows that processes started on and never came back from, faults they ended with); forgets both."""
        deaths = list(self._open.values()), self._faults
        self._open, self._faults = {}, []
        return deaths


def start_monitor(job: str) -> Any:
    """A monitor actor on the driver's node, without a CPU of its own: it is there as long as the driver is."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(MonitorState).options(num_cpus=0, scheduling_strategy=here, max_restarts=-1).remote(job)


@dataclass
class Watch:
    """Shows a monitor's totals as a progress line while a job runs, and hands them to a tracker."""

    monitor: Any
    progress: Progress
    start: int
    figures: Callable[[dict[str, float], float], dict[str, float | str]]
    on_totals: Callable[[dict[str, float]], None] = lambda totals: None
    total: int | None = None
    ended_by: PipelineError | None = None  # why there is nothing to wait for any more
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _raylets: LocalRaylets | None = None

    def __enter__(self) -> Watch:
        self._raylets = LocalRaylets()
        self._thread = threading.Thread(target=self._poll, name="progress", daemon=True)
        self._thread.start()
        return self

    def finish(self, done: int) -> None:
        """All is done, and this many by the ledger's own count, which knows what reports have not told yet."""
        self._stop_polling()
        self.progress.update(done)

    def _stop_polling(self) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join(timeout=10)

    def __exit__(self, *_: object) -> None:
        self._stop_polling()
        self.progress.close()
        if self.ended_by is not None:
            raise self.ended_by from None

    def _poll(self) -> None:
        began = time.monotonic()
        while not self._stop.wait(_POLL_S):
            if self._raylets is not None and not self._raylets.all_live():
                lost = StoppedError(
                    "Ray's node process on this machine died (killed, or out of memory); what was committed is kept",
                    next_step="see that the machine has room, then run the same command again",
                )
                return self._end(lost)
            try:
                totals, hopeless = ray.get(self.monitor.totals.remote(), timeout=5)
            except RayError:
                continue  # the display waits; the work does not
            if hopeless is not None:
                return self._end(hopeless)
            done = self.start + int(totals.get("rows", 0))
            # Rows that are done again, after a death, count twice here and once in the ledger.
            done = min(done, self.total) if self.total is not None else done
            self.progress.update(done, **self.figures(totals, time.monotonic() - began))
            try:
                self.on_totals(totals)
            except PipelineError as error:  # another run has taken over, say
                return self._end(error)

    def _end(self, error: PipelineError) -> None:
        """Interrupt the main thread: Ray itself would let it wait for ever."""
        self.ended_by = error
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


# -- What a process of a stage does around its work: it says what it is busy with, and why it cannot go on -----
#
# Runs on the workers, beside the work itself; torch is imported by the work, not here.


_SEND_S = 1.0  # at least, between two sendings of amounts by one process
_PAUSE_S = 10.0  # before a process that cannot start on its device makes room for another try
_TELL_S = 10.0
T = TypeVar("T")


class Amounts:
    """Adds up what a process has to tell of its work: the monitor is one process, of which thousands ask for a turn.

    add: sent with all that came before it once `_SEND_S` have passed since the last time, else kept. From any thread.
    """

    def __init__(self, send: Callable[[dict[str, float]], object]) -> None:
        self._send, self._sums, self._sent_s = send, dict[str, float](), -math.inf
        self._lock = threading.Lock()

    def add(self, amounts: Mapping[str, float]) -> None:
        """Add to the job's totals, some time soon."""
        with self._lock:
            for name, amount in amounts.items():
                self._sums[name] = self._sums.get(name, 0.0) + amount
            due = time.monotonic() - self._sent_s >= _SEND_S
        if due:
            self.flush()

    def flush(self) -> None:
        """Send what is kept, if anything, now: nothing may come after it."""
        if amounts := self.take():
            self._send(amounts)

    def take(self) -> dict[str, float]:
        """What is kept, for whoever sends it with something else."""
        with self._lock:
            amounts, self._sums, self._sent_s = self._sums, {}, time.monotonic()
            return amounts


class Reports:
    """What one process of a stage tells the monitor.

    What it is busy with is sent at once, since it may die of it; what it has done is added up. execution: the number
    of the one that it was started for.
    """

    def __init__(self, monitor: Any, stage: str, execution: int = 0) -> None:
        self._monitor, self._stage = monitor, (execution, stage)
        self._process = f"{os.uname().nodename}-{os.getpid()}-{id(self):x}"
        self._calls = itertools.count()
        self._amounts = Amounts(monitor.add.remote)
        self.add = self._amounts.add

    def load(self, load: Callable[[], T]) -> Callable[[], T]:
        """`held`, but for what is wrong with this device alone: it does not work, or others fill its memory.

        That must not end the job for those that work elsewhere: such a process says so and ends, Ray starts another,
        and the monitor knows when none can start.
        """
        self._monitor.loading.remote(self._stage, self._process)
        gc.disable()  # of what is imported and loaded nothing is garbage; looking for it takes a fifth of the time
        try:
            loaded = load()
        except Exception as error:
            # Another device may do: this one does not work, or has too little memory left.
            failure: PipelineError | None = None
            if isinstance(error, PipelineError):
                failure = error if error.__cause__ is not None and out_of_memory(error.__cause__) else None
            elif (fault := device_fault(error)) is not None:
                failure = stopped_by(fault, f"Starting the {self._stage[1]}")
            if failure is not None:
                self._monitor.cannot_start.remote(self._stage, self._process, failure)
                time.sleep(_PAUSE_S)
                raise failure from error
            answer = _fails(error, self._stage[1])
        else:
            answer = lambda: loaded  # noqa: E731 - the one line says it
            gc.freeze()  # it lives as long as the process, whose end would search it for garbage for a second
        finally:
            gc.enable()
        self._monitor.started.remote(self._stage, self._process)
        return answer

    @contextmanager
    def busy(self, block: pa.Table) -> Iterator[None]:
        """Around the work on a block: a process that dies leaves its rows open; one that its device ends, none."""
        call = next(self._calls)
        self._monitor.begin.remote(self._stage, self._process, call, touched(block), self._amounts.take())
        try:
            with ends_with_its_device(self._stage[1], self.fault):
                yield
        except Exception:
            self._amounts.flush()  # the process may be given nothing else to do
            raise
        self._monitor.end.remote(self._process, call, self._amounts.take())

    def fault(self, fault: str) -> None:
        """This process ends because of its device or of software; returns when the monitor knows."""
        self._amounts.flush()
        ray.get(self._monitor.fault.remote(self._process, fault), timeout=_TELL_S)


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
