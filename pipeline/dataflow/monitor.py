"""What actors say of themselves while they work, and the thread that shows it and watches over the job."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.dataflow.cluster import Gauges, LocalRaylets
from pipeline.errors import PipelineError, StoppedError
from pipeline.progress import Progress

_POLL_S = 0.5
Rows = tuple[int, int, int]  # of a unit: (unit, first row, last row + 1)


@dataclass
class _Starts:
    """How the processes of one stage have started in this execution."""

    expected: int
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
        self._starts: dict[str, _Starts] = {}

    def expect(self, actors: Mapping[str, int]) -> None:
        """An execution begins: so many processes of each stage are to start."""
        self._starts = {stage: _Starts(count) for stage, count in actors.items()}

    def loading(self, stage: str, process: str) -> None:
        """A process begins to load what it works with."""
        starts = self._starts.setdefault(stage, _Starts(1))
        starts.begun += 1
        starts.loading.add(process)

    def started(self, stage: str, process: str) -> None:
        """It has, or met an error that its first call will raise."""
        starts = self._starts.setdefault(stage, _Starts(1))
        starts.started += 1
        starts.loading.discard(process)

    def cannot_start(self, stage: str, process: str, error: PipelineError) -> None:
        """It could not, on the device that it was given; another process may, on another."""
        starts = self._starts.setdefault(stage, _Starts(1))
        starts.failures.append(error)
        starts.loading.discard(process)

    def begin(self, process: str, call: int, rows: list[Rows]) -> None:
        """A process starts on some rows."""
        self._open[process, call] = rows

    def end(self, process: str, call: int) -> None:
        """It came back from them."""
        self._open.pop((process, call), None)

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
        hopeless = (starts.hopeless(stage) for stage, starts in self._starts.items())
        return dict(self._done), next((error for error in hopeless if error is not None), None)

    def deaths(self) -> tuple[list[list[Rows]], list[str]]:
        """(rows that processes started on and never came back from, faults they ended with); forgets both."""
        found = list(self._open.values()), self._faults
        self._open, self._faults = {}, []
        return found


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

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join(timeout=10)
        self.progress.close()
        if self.ended_by is not None:
            raise self.ended_by from None

    def _poll(self) -> None:
        began = time.monotonic()
        while not self._stop.wait(_POLL_S):
            if self._raylets is not None and not self._raylets.all_live():
                return self._end(_raylet_lost())
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


def _raylet_lost() -> StoppedError:
    return StoppedError(
        "Ray's node process on this machine died (killed, or out of memory); what was committed is kept",
        next_step="see that the machine has room, then run the same command again",
    )
