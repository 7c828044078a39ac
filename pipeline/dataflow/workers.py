"""Work on many items: by processes of the cluster that RAY_ADDRESS names, or by threads of this one.

    items --one at a time, to whoever is free--> workers --as they are ready--> results

Where Ray Data moves rows between stages, here an item is small (which files, which rows) and so is what comes back:
a worker reads, writes and commits by itself. What it works with is made where it works, once a worker. No more items
are under way than there are workers, so that the driver holds few of them, however many there are.

A worker that dies, with its node say, is replaced and its item given to another: an item may be worked on twice, also
at the same time, so what a worker does must be right when it is repeated. An item on which workers die again and
again ends the job. A crash of the driver leaves what workers have committed, and ends them.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Literal, TypeVar

from pipeline.dataflow.cluster import ClusterConfig, device_of, ensure_ray, shutdown_ray
from pipeline.dataflow.device_faults import cuda_problem, device_fault, driver_version, stopped_by, unusable_cuda
from pipeline.errors import StoppedError

_log = logging.getLogger(__name__)
_REPEATS = 2  # of an item whose worker died
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Workers:
    """Those of a job: `count` of them; `name` for people, what each reserves, and what it computes on."""

    name: str
    count: int
    device: Literal["cuda", "cpu"] = "cpu"
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    memory_bytes: int = 0
    on_cluster: bool = False

    def spread(self, make: Callable[[], Callable[[T], R]], items: Iterable[T]) -> Iterator[R]:
        """What `make()` gives, called with each item; results come as they are ready, in any order.

        Both travel to a cluster's workers and must be picklable there, and results back. Raises what a call raised,
        StoppedError when workers die again and again.
        """
        return _Actors(self, make).run(iter(items)) if self.on_cluster else in_threads(self.count, make, items)


def in_threads(count: int, make: Callable[[], Callable[[T], R]], items: Iterable[T]) -> Iterator[R]:
    """As `Workers.spread`, by so many threads of this process; by its own, where it is one."""
    if count == 1:
        yield from map(make(), items)
        return
    items, function, pool = iter(items), make(), ThreadPoolExecutor(count)
    try:
        running = {pool.submit(function, item) for item in islice(items, count)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(function, item) for item in islice(items, len(done))}
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def open_workers(
    name: str,
    cluster: ClusterConfig,
    count: int | None = None,
    *,
    num_cpus: float = 1.0,
    memory_bytes: int = 0,
    device: str | None = None,
    key: str = "workers",
) -> Iterator[Workers]:
    """Workers on the cluster at RAY_ADDRESS, or on this machine without one; `name` says what one of them does.

    count: at most so many; None: as many as there is room for, by CPUs and the memory that each takes. device: they
    compute networks, as a job's `device` says: each beside a GPU of its own where the cluster has any; one, on this
    machine. key: of the configuration, that says what one takes. ConfigError when no node has room for one, or GPUs
    are asked for and there are none, or do not compute.
    """
    if not os.environ.get("RAY_ADDRESS"):
        if device is not None:
            yield Workers(name, 1, own_device(device, cluster))
            return
        import psutil

        free = psutil.virtual_memory().available // memory_bytes if memory_bytes else os.cpu_count() or 1
        yield Workers(name, count or max(1, min(os.cpu_count() or 1, free)))
        return
    import ray

    connected = ray.is_initialized()
    ensure_ray(cluster)
    from pipeline.dataflow.resources import Kind, check_devices, check_nodes, no_gpus, node_offers, room_for

    try:
        gpus = bool(ray.cluster_resources().get("GPU", 0.0)) and device not in (None, "cpu")
        if not gpus and (device == "cuda" or (device == "auto" and cluster.device == "cuda")):
            raise no_gpus(cluster)
        kind = Kind(name, num_cpus, float(gpus), memory_bytes)
        offers = node_offers()
        check_nodes([kind], offers, "device" if gpus else key)
        if gpus:
            check_devices(cluster)
        room = sum(room_for(kind, node) for node in offers)
        computing = device_of(cluster, kind.gpus)
        yield Workers(name, min(count or room, room), computing, num_cpus, kind.gpus, memory_bytes, on_cluster=True)
    finally:
        if not connected:  # else whoever did goes on with it
            shutdown_ray()


def own_device(device: str, cluster: ClusterConfig) -> Literal["cuda", "cpu"]:
    """What this process computes on, "cuda" or "cpu"; ConfigError when it is to be CUDA, and that does not work."""
    if device == "cpu" or cluster.device == "cpu":
        return "cpu"
    problem = cuda_problem()
    if problem is None:
        return "cuda"
    if device == "cuda" or cluster.device == "cuda":
        raise unusable_cuda(problem, "this machine", key="device", value=device)
    if driver_version() is not None:
        _log.warning("this machine has an NVIDIA driver, but CUDA does not work: computing on the CPU (%s)", problem)
    return "cpu"


# -- On a cluster: an actor a worker, and a driver that replaces those that die --------------------------------


@dataclass
class _Item(Generic[T]):
    content: T
    deaths: int = 0


class _Actors(Generic[T, R]):
    """The actors of one `spread`: each has one call under way, the first being its own start."""

    def __init__(self, workers: Workers, make: Callable[[], Callable[[T], R]]) -> None:
        import ray

        options: dict[str, Any] = {"num_cpus": workers.num_cpus, "num_gpus": workers.num_gpus, "max_restarts": 0}
        if workers.memory_bytes:
            options["memory"] = workers.memory_bytes
        self._ray, self._workers = ray, workers
        self._actor = ray.remote(**options)(_Worker)
        # Once for all of them: it may hold the row groups of a dataset.
        self._made = ray.put(make)
        self._busy: dict[Any, tuple[Any, _Item[T] | None]] = {}
        self._again: deque[_Item[T]] = deque()
        self._deaths = 0  # since the last result

    def run(self, items: Iterator[T]) -> Iterator[R]:
        """The results, as they are ready."""
        waiting = (_Item(content) for content in items)
        following = next(waiting, None)
        try:
            for _ in range(self._workers.count if following is not None else 0):
                self.start()
            while following is not None or self._again or any(item for _, item in self._busy.values()):
                (answered, *_), _ = self._ray.wait(list(self._busy))
                actor, item = self._busy.pop(answered)
                results = self.answer(answered, item)
                if results is None:
                    self._ray.kill(actor)
                    self.start()
                    continue
                if self._again or following is not None:
                    item = self._again.popleft() if self._again else following
                    assert item is not None
                    if item is following:
                        following = next(waiting, None)
                    self._busy[actor.call.remote(item.content)] = actor, item
                else:
                    self._ray.kill(actor)
                yield from results
        finally:
            for actor, _ in self._busy.values():
                self._ray.kill(actor)

    def start(self) -> None:
        """One actor more."""
        actor = self._actor.remote()
        self._busy[actor.start.remote(os.getcwd(), self._made)] = actor, None

    def answer(self, answered: Any, item: _Item[T] | None) -> list[R] | None:
        """What a call has given, nothing for a start; None when its worker has died."""
        from pipeline.dataflow.passes import known_cause

        died = self._ray.exceptions
        try:
            result = self._ray.get(answered)
        except (died.RayActorError, died.WorkerCrashedError, died.OutOfMemoryError, died.ObjectLostError) as error:
            self._deaths += 1
            told = " ".join(str(error).split())[:600]
            if item is not None:
                item.deaths += 1
                self._again.append(item)
            on_one = item is not None and item.deaths > _REPEATS
            if on_one or self._deaths > _REPEATS + 2 * self._workers.count:
                times = f"{item.deaths} times on one piece of work" if item and on_one else f"{self._deaths} times"
                raise StoppedError(
                    f"Workers died {times} without anything done ({self._workers.name}); the last time: {told}",
                    rule="what was committed is kept",
                    next_step="see the node's memory and Ray's worker logs, then run the same command again",
                ) from None
            _log.warning("a worker died and is replaced (%s): %s", self._workers.name, told)
            return None
        except died.RayError as error:
            raise known_cause(error) or error from None
        self._deaths = 0 if item is not None else self._deaths
        return [] if item is None else [result]


class _Worker:
    """What `make` gives is made by the first call, whose errors arrive as what they are."""

    def start(self, folder: str, make: Callable[[], Callable[[Any], Any]]) -> None:
        """It is there, in the driver's folder where that is shared: a configuration may name places from there."""
        if os.path.isdir(folder):
            os.chdir(folder)
        self._make = make
        self._function: Callable[[Any], Any] | None = None

    def call(self, item: Any) -> Any:
        """What the function gives."""
        try:
            if self._function is None:
                self._function = self._make()
            return self._function(item)
        except Exception as error:
            fault = device_fault(error)
            if fault is None:
                raise
            raise stopped_by(fault, "The work beside the GPU") from None
