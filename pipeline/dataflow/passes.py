"""Executions over the gaps of a plan, repeated until none is left or nothing moves any more; and who is to blame."""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa
import ray
from ray.data import DataContext, ExecutionResources
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasink, Datasource, ReadTask
from ray.exceptions import RayError

from pipeline.dataflow.device_faults import stopped_by
from pipeline.dataflow.monitor import Rows
from pipeline.errors import InputError, PipelineError, StoppedError
from pipeline.storage.errors import describe, job_error, storage_errors
from pipeline.store.ledger.generation import Generation
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.ledger.state import State
from pipeline.store.plan import Work, work_of

T = TypeVar("T")

# -- One Ray Data execution: how it is set up, and what an error that ends it means ----------------------------


def configure_ray_data() -> None:
    """Ray Data as this project needs it: no dropped blocks, no bars of its own."""
    # What goes wrong is told by the job itself; Ray's own account, with its tracebacks, goes to its log files.
    for handler in logging.getLogger("ray.data").handlers:
        if not hasattr(handler, "baseFilename") and type(handler).__name__ != "SessionFileHandler":
            handler.setLevel(logging.CRITICAL)
    # Bounded repeats of a task can be asked for in this way only.
    warnings.filterwarnings("ignore", message=".*ray_remote_args.* is deprecated")
    context = DataContext.get_current()
    context.max_errored_blocks = 0
    # An actor that cannot start is replaced, without end: the monitor knows when none can (`_Starts`).
    context.max_consecutive_actor_init_deaths = -1
    # Else a UDF's own error arrives as text inside another one, and what it means is lost.
    context.raise_original_map_exception = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False


def whole_blocks() -> None:
    """Blocks stay what the stages made them: none is split for its size."""
    DataContext.get_current().target_max_block_size = None


def run_execution(execute: Callable[[], None]) -> RayError | None:
    """Run one Ray Data execution: None when it finished, the error when workers died in it.

    Errors with a meaning of their own (a conflict, a full disk, a bad configuration) are raised as what they are.
    """
    try:
        execute()
    except RayError as error:
        known = known_cause(error)
        if known is not None:
            raise known from None
        # Where code raised, repeating it cannot help; a process that it asked and that died is a dying process.
        asked_in_vain = any(isinstance(cause, ray.exceptions.RayActorError) for cause in _causes(error))
        if isinstance(error, ray.exceptions.RayTaskError) and not asked_in_vain:
            raise
        return error
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    queue: list[BaseException | None] = [error]
    seen: set[int] = set()
    while queue:
        e = queue.pop(0)
        if e is None or id(e) in seen:
            continue
        seen.add(id(e))
        yield e
        queue += [getattr(e, "cause", None), e.__cause__, e.__context__]


def known_cause(error: BaseException) -> PipelineError | None:
    """The error with a meaning of its own that an error of Ray carries; None when there is none."""
    causes = [cause for cause in _causes(error) if not isinstance(cause, RayError)]
    for cause in causes:
        if isinstance(cause, PipelineError):
            return cause
    # The last is the first that was raised: what wraps it has Ray's advice about retries in its text.
    for cause in reversed([cause for cause in causes if isinstance(cause, storage_errors())]):
        return refused(cause)
    return None


def refused(error: BaseException) -> PipelineError:
    return job_error(error) or InputError(
        f"The store refused an operation: {describe(error)}",
        rule="what was committed before stays; nothing half-written is visible",
        next_step="see to the store, then run the same command again",
    )


# -- How units of work enter Ray Data, and how rows leave it: one read task a unit, one commit a write task ----


class UnitSource(Datasource):  # type: ignore[misc]
    """One read task per unit of work; `reader_of` gives what runs on a worker, for one unit, and yields blocks."""

    def __init__(
        self,
        name: str,
        work: list[Work],
        reader_of: Callable[[Work], Callable[[], Iterable[pa.Table]]],
        size_bytes: int,
    ) -> None:
        super().__init__()
        self._name, self._work, self._reader_of, self._size_bytes = name, work, reader_of, size_bytes

    def get_name(self) -> str:
        """The name in Ray's displays."""
        return self._name

    def estimate_inmemory_data_size(self) -> int:
        """Source bytes of all units."""
        return self._size_bytes

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """One task per unit, whatever Ray suggests: a unit is what a crash costs."""
        size = self._size_bytes // max(len(self._work), 1)
        return [
            ReadTask(
                partial(quietly, self._reader_of(work)),
                BlockMetadata(num_rows=None, size_bytes=size, exec_stats=None, input_files=None),
            )
            for work in self._work
        ]


def quietly(function: Callable[..., T], *arguments: Any) -> T:
    """What a function gives in a task: what Ray raises there when an execution ends early is not printed.

    Ray raises KeyboardInterrupt between any two instructions. Within a callback of Python's own, of a weak reference
    say, it cannot go on upwards, and Python would print a traceback into the words of a job that told its error.
    """
    sys.unraisablehook = lambda raised: (
        None if raised.exc_type is KeyboardInterrupt else sys.__unraisablehook__(raised)
    )
    return function(*arguments)


class LedgerSink(Datasink[int]):  # type: ignore[misc]
    """Hands each write task's rows to `write`, which commits them; returns only their number."""

    def __init__(self, name: str, write: Callable[[pa.Table], None], min_rows: int) -> None:
        self._name, self._write, self._min_rows = name, write, min_rows

    def get_name(self) -> str:
        """The name in Ray's displays."""
        return self._name

    @property
    def min_rows_per_write(self) -> int:
        """Rows a write waits for, so that fragments have a useful size."""
        return self._min_rows

    def write(self, blocks: Iterable[Any], ctx: Any) -> int:
        """Commit all rows of this task at once."""
        tables = [b if isinstance(b, pa.Table) else pa.Table.from_pandas(b) for b in blocks]
        tables = [t for t in tables if t.num_rows]
        if not tables:
            return 0
        table = pa.concat_tables(tables)
        try:
            quietly(self._write, table)
        except storage_errors() as error:
            # Told here, where the error is whole: Ray adds advice about its retries to what it carries.
            raise refused(error) from error
        return int(table.num_rows)


_log = logging.getLogger(__name__)
# Passes that faults of devices or software ended without any progress, before the job stops and says which.
_FAULTY_PASSES = 2


# How often it is asked whether a running execution has come to its tail, where others wait.
_TAIL_POLL_S = 0.5
_BLOCKS_SHARE = 0.5  # of the object stores, as Ray Data takes by itself


@dataclass(frozen=True)
class Execution:
    """One execution, ready to run, and how many actors of each stage will start for it.

    run travels to another process where a job has several drivers.
    """

    actors: Mapping[str, int]
    run: Callable[[], None]


class ExecutionDriver:
    """An actor that runs executions, so that no one process hands out all blocks of a job.

    drivers: how many there are at a time; blocks of all of them share the cluster's memory.
    """

    def __init__(self, drivers: int) -> None:
        configure_ray_data()
        memory = ray.cluster_resources().get("object_store_memory", 0.0) * _BLOCKS_SHARE / drivers
        DataContext.get_current().execution_options.resource_limits = ExecutionResources.for_limits(
            object_store_memory=memory
        )

    def run(self, execute: Callable[[], None]) -> str | None:
        """As `run_execution`; the error as text, for Ray's own do not all travel."""
        error = run_execution(execute)
        return None if error is None else str(error)


def run_elsewhere(execute: Callable[[], None], drivers: int) -> Exception | None:
    """`run_execution` by a driver of its own, which ends with it: where it dies, its rows are open."""
    driver = ray.remote(ExecutionDriver).options(num_cpus=0, scheduling_strategy="SPREAD").remote(drivers)
    answers: list[str | None] = []
    error = run_execution(lambda: answers.append(ray.get(driver.run.remote(execute))))
    return RuntimeError(answers[0]) if answers and answers[0] is not None else error


@dataclass
class Passes:
    """The loop that the jobs share.

    look() gives (state, gaps) from the ledger. prepare(work, state, alone, number) looks at the cluster and gives an
    execution; `alone` for units under suspicion: a process then has one row at a time, and says which.
    quarantine(rows) commits rows as rejects on which processes die so, again and again.

    drivers: executions at a time, each of other units and all under the one generation; with more than one, each is
    run by a process of its own, somewhere on the cluster. One more begins for each that has come to its tail, and its
    actors start as those of the other end.
    """

    monitor: Any
    generation: Generation
    look: Callable[[], tuple[State, RowSet]]
    prepare: Callable[[list[Work], State, bool, int], Execution]
    quarantine: Callable[[list[tuple[int, int]]], None]
    units_per_execution: int
    crash_limit: int
    doing: str
    on_clean_pass: Callable[[], None] = lambda: None
    drivers: int = 1
    suspects: set[int] = field(default_factory=set)
    # What dead workers were busy with, over all passes: their last word does not always arrive.
    _left_open: Counter[tuple[Rows, ...]] = field(default_factory=Counter)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _running: dict[Future[Exception | None], int] = field(default_factory=dict)

    def run(self) -> State:
        """Executions until there is no gap; StoppedError when workers die without any progress."""
        state, gaps = self.look()
        stalled = 0
        while gaps:
            failures = self._pass_over(gaps, state)
            self.generation.check()
            faults = self._classify_failures(failures)
            if not failures:
                self.on_clean_pass()
            state, open_rows = self.look()
            stalled = stalled + 1 if open_rows == gaps else 0
            gaps = open_rows
            if faults and stalled >= _FAULTY_PASSES:
                raise stopped_by(faults[-1], self.doing)
            if stalled > (self.crash_limit if failures else 1):
                # An open end counts as endless.
                count = gaps.count()
                left = f"{count:,} rows are left" if count < 1 << 30 else "some rows are left"
                if not failures:
                    raise StoppedError(
                        f"The source has changed; {left}",
                        rule="what is read is the version that the listing showed; what was committed is kept",
                        next_step="see the messages above, then run the same command again: it lists anew",
                    )
                raise StoppedError(
                    f"Workers died {stalled} times without progress; {left}; the last time: "
                    f"{' '.join(str(failures[-1]).split())[:800]}",
                    rule="what was committed is kept",
                    next_step="mend what ends the workers (memory, disk, the device, a plug-in), then run the same "
                    "command again",
                ) from failures[-1]
        return state

    def _pass_over(self, gaps: RowSet, state: State) -> list[Exception]:
        """Executions over all gaps, then over units under suspicion, row by row; the errors that ended some."""
        failures: list[Exception] = []
        suspect: list[Work] = []
        for work in work_of(gaps, self.units_per_execution):
            usual = [w for w in work if w.unit not in self.suspects]
            suspect += [w for w in work if w.unit in self.suspects]
            if usual:
                self._collect(failures, until=self._has_room)
                self._start(usual, state, failures, alone=False)
        self._collect(failures)
        for first in range(0, len(suspect), self.units_per_execution):
            self._start(suspect[first : first + self.units_per_execution], state, failures, alone=True)
            self._collect(failures)
        return failures

    def _start(self, work: list[Work], state: State, failures: list[Exception], *, alone: bool) -> None:
        """Begin an execution in a thread of its own, which asks a driver where there are several."""
        number = next(self._numbers)
        prepared: list[Execution] = []

        def prepare() -> None:
            execution = self.prepare(work, state, alone, number)
            ray.get(self.monitor.expect.remote(number, dict(execution.actors), len(work)))
            prepared.append(execution)

        if (error := run_execution(prepare)) is not None:
            self._failed(error, failures)
            return
        execute = prepared[0].run
        future: Future[Exception | None] = Future()

        def run() -> None:
            try:
                future.set_result(
                    run_execution(execute) if self.drivers == 1 else run_elsewhere(execute, self.drivers)
                )
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                future.set_exception(error)

        self._running[future] = number
        # No thread that the end of the job would wait for: without Ray it ends by itself.
        threading.Thread(target=run, name=f"execution-{number}", daemon=True).start()

    def _has_room(self) -> bool:
        """Whether another execution may begin: of those that run fewer than `drivers` are not at their tail."""
        if len(self._running) < self.drivers:
            return True
        if len(self._running) >= 2 * self.drivers:
            return False  # a straggler does not let more and more of them begin
        try:
            tails = set(ray.get(self.monitor.tails.remote(), timeout=60))
        except RayError:
            return False  # then when one ends
        return sum(number not in tails for number in self._running.values()) < self.drivers

    def _collect(self, failures: list[Exception], until: Callable[[], bool] = lambda: False) -> None:
        """Wait until all executions have ended, or until it is so; raises what one raised."""
        while self._running and not until():
            for future in wait(self._running, _TAIL_POLL_S, FIRST_COMPLETED).done:
                number, error = self._running.pop(future), future.result()
                self.monitor.ended.remote(number)
                if error is not None:
                    self._failed(error, failures)
                # By and by: whoever opens the dataset, this run after its pass too, reads few objects then.
                self.generation.seal()

    def _failed(self, error: Exception, failures: list[Exception]) -> None:
        _log.warning("workers died, going on with what is left: %s", str(error).splitlines()[0])
        failures.append(error)

    def _classify_failures(self, failures: list[Exception]) -> list[str]:
        """After a pass: units that workers died on run row by row from now on, rows they die on are quarantined.

        What a worker died on again and again is left open by several processes; what a bystander was busy with when
        the execution broke down, by one. Blocks that shared a worker with it time after time come under suspicion,
        too; units under suspicion have their workers to themselves. Returns the faults of devices and software that
        ended workers: their rows are under no suspicion.
        """
        try:
            left, faults = ray.get(self.monitor.deaths.remote(), timeout=60)
        except ray.exceptions.RayError as error:
            _log.warning("what the dead workers were busy with is unknown: %s", str(error).splitlines()[0])
            return []
        if not failures:
            return []
        deaths = Counter(tuple(rows) for rows in left)
        self._left_open.update(deaths)
        single = [r[0] for r, times in deaths.items() if times > 1 and len(r) == 1 and r[0][2] - r[0][1] == 1]
        guilty = sorted({(unit, row) for unit, row, _ in single if unit in self.suspects})
        self.suspects |= {unit for r, times in self._left_open.items() if times > 1 for unit, _, _ in r}
        if guilty:
            self.quarantine(guilty)
            _log.warning("%d row(s) quarantined: the process died on each of them alone, again", len(guilty))
        return list(faults)
