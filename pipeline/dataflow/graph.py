"""The Ray Data side of exactly-once: sources of units, a sink that commits, and passes until nothing is left.

Ray repeats, splits and reorders tasks and blocks as it likes. So a read task is one unit's gaps, rows carry
their address, a write task commits what it got, and after each pass the ledger, not Ray, says what is missing.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasink, Datasource, ReadTask
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.dataflow.cluster import CPU_WORKER_ENV, Gauges, LocalRaylets
from pipeline.errors import ConfigError, InputError, PipelineError, StoppedError
from pipeline.progress import Progress
from pipeline.storage_errors import describe, job_error, storage_errors
from pipeline.store.work import Work

_POLL_S = 0.5
T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """What one process of some kind reserves, all of it on one node."""

    name: str
    cpus: float
    gpus: float = 0.0


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
                self._reader_of(work),
                BlockMetadata(num_rows=None, size_bytes=size, exec_stats=None, input_files=None),
            )
            for work in self._work
        ]


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
            self._write(table)
        except storage_errors() as error:
            # Told here, where the error is whole: Ray adds advice about its retries to what it carries.
            raise _refused(error) from error
        return int(table.num_rows)


class MonitorState:
    """What actors report while they work: for display and for finding the unit that kills them, never for truth."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._meters: dict[str, Any] = {}
        self._gauges = Gauges(job)
        self._done: dict[str, float] = {}
        self._open: dict[str, list[tuple[int, int, int]]] = {}
        self._deaths: dict[tuple[int, int, int], int] = {}

    def begin(self, actor: str, ranges: list[tuple[int, int, int]]) -> None:
        """An actor starts on some rows."""
        self._open[actor] = ranges

    def end(self, actor: str) -> None:
        """It came back from them."""
        self._open.pop(actor, None)

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

    def totals(self) -> dict[str, float]:
        """The named totals."""
        return dict(self._done)

    def left_open(self) -> list[list[tuple[int, int, int]]]:
        """Rows that actors started on and never came back from; forgets them."""
        left = list(self._open.values())
        self._open = {}
        return left


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
    lost: bool = False
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
        if self.lost:
            raise StoppedError(
                "Ray's node process on this machine died (killed, or out of memory); what was committed is kept",
                next_step="see that the machine has room, then run the same command again",
            ) from None

    def _poll(self) -> None:
        began = time.monotonic()
        while not self._stop.wait(_POLL_S):
            if self._raylets is not None and not self._raylets.all_live():
                # Ray itself would let the driver wait for ever.
                self.lost = True
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return
            try:
                totals = ray.get(self.monitor.totals.remote(), timeout=5)
            except RayError:
                continue  # the display waits; the work does not
            done = self.start + int(totals.get("rows", 0))
            # Rows that are done again, after a death, count twice here and once in the ledger.
            done = min(done, self.total) if self.total is not None else done
            self.progress.update(done, **self.figures(totals, time.monotonic() - began))
            self.on_totals(totals)


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
    # Else a UDF's own error arrives as text inside another one, and what it means is lost.
    context.raise_original_map_exception = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False


def whole_blocks() -> None:
    """Blocks stay what the stages made them: none is split for its size."""
    DataContext.get_current().target_max_block_size = None


def actor_pool(
    size: int, retries: int, batch_rows: int | None = None, calls: int = 1, *, num_gpus: float
) -> dict[str, Any]:
    """Arguments for a pool of `size` actors that are replaced when they die, with bounded repeats of a task.

    `num_gpus` each reserves (`device_options`).
    `batch_rows` cuts what an actor gets per call; None hands it whole blocks. `calls`: at a time, per actor.
    """
    # By default as many again wait at an actor: in small jobs, and at the end of all, others are idle meanwhile.
    waiting = {"max_tasks_in_flight_per_actor": calls} if calls > 1 else {}
    strategy = ActorPoolStrategy(
        size=size, max_concurrent_calls_per_actor=calls, enable_true_multi_threading=calls > 1, **waiting
    )
    return {
        "compute": strategy,
        "batch_size": batch_rows,
        "batch_format": "pyarrow",
        "max_restarts": -1,
        "max_task_retries": retries,
        **device_options(num_gpus),
    }


def device_options(num_gpus: float) -> dict[str, Any]:
    """Ray's options of an actor that computes: the GPUs it reserves; without any, CPU_WORKER_ENV."""
    return {"num_gpus": num_gpus} if num_gpus else {"runtime_env": {"env_vars": CPU_WORKER_ENV}}


def check_together(demands: Mapping[str, float], key: str, resource: Literal["CPU", "GPU"] = "CPU") -> None:
    """ConfigError unless the cluster can hold all demands at once: Ray would wait for ever, silently."""
    have = ray.cluster_resources().get(resource, 0.0)
    need = sum(demands.values())
    if need > have + 1e-6:
        raise ConfigError(
            f"The job needs {need:g} {resource}s at once and the cluster has {have:g}: it would wait for ever",
            key=key,
            value=", ".join(f"{name} {amount:g}" for name, amount in demands.items()),
            rule=f"what must run beside each other must fit the cluster's {resource}s together",
            next_step=f"lower the number of actors or the {resource}s they reserve, or add nodes",
        )


def check_nodes(kinds: Iterable[Kind], nodes: Iterable[Mapping[str, float]], key: str) -> None:
    """ConfigError unless each kind of process fits a whole node by itself: for one that does not, Ray waits for ever.

    `nodes`: what each node offers, by name ("CPU", "GPU").
    """
    offers = [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes]
    for kind in kinds:
        if any(cpus + 1e-6 >= kind.cpus and gpus + 1e-6 >= kind.gpus for cpus, gpus in offers):
            continue
        shown = sorted({f"{cpus:g} CPUs and {gpus:g} GPUs" for cpus, gpus in offers})
        raise ConfigError(
            f"No node has room for {kind.name}, which takes {kind.cpus:g} CPUs and {kind.gpus:g} GPUs: "
            "it would wait for ever",
            key=key,
            value=f"{kind.cpus:g} CPUs, {kind.gpus:g} GPUs",
            rule=f"one node must offer both; the cluster's nodes offer {'; '.join(shown) or 'nothing'}",
            next_step="lower what it reserves (no GPUs: 0), add such nodes, or ask an autoscaler for them with "
            "cluster.request_cpus and cluster.request_gpus",
        )


def node_offers() -> list[dict[str, float]]:
    """What each living node of the cluster offers."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def answer(reference: Any) -> Any:
    """What another actor answers, once it has; raises what it raised."""
    return ray.get(reference)


def held(load: Callable[[], T]) -> Callable[[], T]:
    """Call `load` now; the answer is a function that returns what it returned, or raises its PipelineError.

    For the start of an actor: an error raised there reaches the driver as a dead actor without its cause, and Ray
    starts the actor anew; one raised by the first call arrives as what it is.
    """
    try:
        loaded = load()
    except PipelineError as error:
        return _raises(error)
    return lambda: loaded


def _raises(error: PipelineError) -> Callable[[], Any]:
    def call() -> Any:
        raise error

    return call


def run_execution(execute: Callable[[], None]) -> RayError | None:
    """Run one Ray Data execution: None when it finished, the error when workers died in it.

    Errors with a meaning of their own (a conflict, a full disk, a bad configuration) are raised as what they are.
    """
    try:
        execute()
    except RayError as error:
        known = _known_cause(error)
        if known is not None:
            raise known from None
        if _is_user_error(error):
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


def _known_cause(error: BaseException) -> PipelineError | None:
    causes = [cause for cause in _causes(error) if not isinstance(cause, RayError)]
    for cause in causes:
        if isinstance(cause, PipelineError):
            return cause
    # The last is the first that was raised: what wraps it has Ray's advice about retries in its text.
    for cause in reversed([cause for cause in causes if isinstance(cause, storage_errors())]):
        return _refused(cause)
    return None


def _refused(error: BaseException) -> PipelineError:
    return job_error(error) or InputError(
        f"The store refused an operation: {describe(error)}",
        rule="what was committed before stays; nothing half-written is visible",
        next_step="see to the store, then run the same command again",
    )


def _is_user_error(error: RayError) -> bool:
    """Whether code raised, rather than a process dying, be it one that the code asked: repeating it cannot help."""
    asked_in_vain = any(isinstance(cause, ray.exceptions.RayActorError) for cause in _causes(error))
    return isinstance(error, ray.exceptions.RayTaskError) and not asked_in_vain
