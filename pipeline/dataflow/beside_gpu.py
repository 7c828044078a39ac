"""Where the work of a job runs that needs no more than one device: in this process, or beside a GPU of the cluster.

The driver of a cluster's job usually stands on a node without GPUs. `device`, as these jobs have it, says whether a
GPU is reserved; what is computed on then, `cluster.device` says, as everywhere.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from pipeline.dataflow.cluster import ClusterConfig, device_of, ensure_ray, shutdown_ray
from pipeline.dataflow.device_faults import cuda_problem, device_fault, driver_version, stopped_by, unusable_cuda
from pipeline.errors import StoppedError

_log = logging.getLogger(__name__)
_CPUS = 1.0
_REPEATS = 2  # of what ran in a process that died
T = TypeVar("T")


@contextmanager
def reserved_gpu(device: str, cluster: ClusterConfig) -> Iterator[str | None]:
    """What work beside a GPU of the cluster at RAY_ADDRESS computes on, "cuda" or "cpu".

    None without RAY_ADDRESS, without GPUs there, and with device="cpu": then the work is this process's own. Raises
    ConfigError when GPUs are asked for and there are none, or when they do not compute.
    """
    if device == "cpu" or not os.environ.get("RAY_ADDRESS"):
        yield None
        return
    ray = ensure_ray(cluster)
    from pipeline.dataflow.resources import Kind, check_devices, check_nodes, no_gpus, node_offers

    try:
        if ray.cluster_resources().get("GPU", 0.0):
            check_nodes([Kind("a process beside a GPU", _CPUS, 1.0)], node_offers(), "device")
            check_devices(cluster)
            yield device_of(cluster, 1.0)
        elif device == "cuda" or cluster.device == "cuda":
            raise no_gpus(cluster)
        else:
            yield None
    finally:
        shutdown_ray()


def run_reserved(work: Callable[..., T], *arguments: Any) -> T:
    """`work(*arguments)` in a process that reserves a GPU; raises what it raised, StoppedError when it dies."""
    import ray

    task = ray.remote(num_cpus=_CPUS, num_gpus=1, max_calls=1, max_retries=_REPEATS)(_run_there)
    return cast(T, _answer(task.remote(os.getcwd(), work, *arguments)))


def reserved_function(make: Callable[[], Callable[..., T]]) -> Callable[..., T]:
    """The function that `make()` gives, called in one process that reserves a GPU and keeps what it has loaded."""
    import ray

    actor = ray.remote(num_cpus=_CPUS, num_gpus=1, max_restarts=_REPEATS, max_task_retries=_REPEATS)(_Loaded)
    loaded = actor.remote(os.getcwd(), make)
    return lambda *arguments: cast(T, _answer(loaded.call.remote(*arguments)))


class _Loaded:
    """An actor: what `make` gives is made by the first call, whose errors arrive as what they are."""

    def __init__(self, folder: str, make: Callable[[], Callable[..., Any]]) -> None:
        self._folder, self._make = folder, make
        self._function: Callable[..., Any] | None = None

    def call(self, *arguments: Any) -> Any:
        if self._function is None:
            self._function = _run_there(self._folder, self._make)
        return _run_there(self._folder, self._function, *arguments)


def _run_there(folder: str, work: Callable[..., T], *arguments: Any) -> T:
    """Run on the worker, in the driver's folder where that is shared: a configuration may name places from there."""
    if os.path.isdir(folder):
        os.chdir(folder)
    try:
        return work(*arguments)
    except Exception as error:
        fault = device_fault(error)
        if fault is None:
            raise
        raise stopped_by(fault, "The work beside the GPU") from None


def _answer(reference: Any) -> Any:
    import ray

    from pipeline.dataflow.passes import known_cause

    try:
        return ray.get(reference)
    except (
        ray.exceptions.RayActorError,
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.OutOfMemoryError,
    ) as error:
        raise StoppedError(
            f"The process beside the GPU died: {' '.join(str(error).split())[:600]}",
            rule="what was committed is kept",
            next_step="see the node's memory and Ray's worker logs, then run the same command again",
        ) from None
    except ray.exceptions.RayError as error:
        raise known_cause(error) or error from None


def own_device(device: str, cluster: ClusterConfig) -> str:
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
