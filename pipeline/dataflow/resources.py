"""What processes reserve: pools of actors, and the refusal of what a cluster can never hold together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.data import ActorPoolStrategy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.dataflow.cluster import CPU_WORKER_ENV, ClusterConfig, lacking
from pipeline.dataflow.device_faults import cuda_problem, device_fault, stopped_by, unusable_cuda
from pipeline.errors import ConfigError, PipelineError, StoppedError

_log = logging.getLogger(__name__)
_ANSWER_S = 120.0  # a process that loads torch and a codec, on a node that was just started


@dataclass(frozen=True)
class Kind:
    """What one process of some kind reserves, all of it on one node."""

    name: str
    cpus: float
    gpus: float = 0.0
    memory_bytes: int = 0


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
    if num_gpus:
        return {"num_gpus": num_gpus}
    variables = lacking(CPU_WORKER_ENV)
    return {"runtime_env": {"env_vars": variables}} if variables else {}


def map_on_actors(dataset: Any, stage: type, arguments: tuple[Any, ...], *, num_cpus: float, **pool: Any) -> Any:
    """`dataset.map_batches` by a pool that `actor_pool` describes.

    Ray's own method refuses whole blocks (batch_size=None) where GPUs are reserved, and a number of rows would glue
    blocks together until they hold so many. Here the stage makes its batches itself, one shape a bucket.
    """
    whole = pool["batch_size"] is None
    method = dataset.map_batches_internal if whole and pool.get("num_gpus") else dataset.map_batches
    return method(stage, fn_constructor_args=arguments, num_cpus=num_cpus, **pool)


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

    `nodes`: what each node offers, by name ("CPU", "GPU", "memory").
    """
    offers = list(nodes)
    for kind in kinds:
        if any(room_for(kind, node) for node in offers):
            continue
        shown = sorted({_amounts(kind, *map(node.get, ("CPU", "GPU", "memory"), (0.0,) * 3)) for node in offers})
        taken = _amounts(kind, kind.cpus, kind.gpus, kind.memory_bytes)
        raise ConfigError(
            f"No node has room for {kind.name}, which takes {taken}: it would wait for ever",
            key=key,
            value=taken,
            rule=f"one node must offer all of it; the cluster's nodes offer {'; '.join(shown) or 'nothing'}",
            next_step="lower what it reserves (no GPUs: 0), add such nodes, or ask an autoscaler for them with "
            "cluster.request_cpus and cluster.request_gpus",
        )


def room_for(kind: Kind, node: Mapping[str, float]) -> int:
    """How many processes of a kind a node holds that offers so much, by name ("CPU", "GPU", "memory")."""
    wanted = (("CPU", kind.cpus), ("GPU", kind.gpus), ("memory", kind.memory_bytes))
    return min((int((node.get(name, 0.0) + 1e-6) / amount) for name, amount in wanted if amount), default=1)


def _amounts(kind: Kind, cpus: float, gpus: float, memory_bytes: float) -> str:
    memory = f" and {memory_bytes / (1 << 30):.1f} GiB" if kind.memory_bytes else ""
    return f"{cpus:g} CPUs and {gpus:g} GPUs{memory}"


def no_gpus(cluster: ClusterConfig) -> ConfigError:
    """The error of a job that must compute on GPUs, on a cluster that has none."""
    return ConfigError(
        "The cluster has no GPUs",
        key="cluster.device",
        value=cluster.device,
        rule="cluster.device=cuda asks for them",
        next_step="add nodes with GPUs (cluster.request_gpus asks an autoscaler), or leave cluster.device at auto",
    )


def node_offers() -> list[dict[str, float]]:
    """What each living node of the cluster offers."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def check_gpus(processes: Sequence[tuple[Kind, int]], nodes: Iterable[Mapping[str, float]], key: str) -> None:
    """ConfigError unless all (kind, number) that reserve GPUs find theirs at once, each part on one GPU of a node.

    Enough GPUs in sum do not suffice: 0.6 and 0.6 fill no single one. Placed largest first, which finds room for
    parts of a few sizes wherever there is some.
    """
    free = [[node.get("CPU", 0.0), *[1.0] * int(node.get("GPU", 0.0))] for node in nodes]
    wanted = sorted((kind for kind, count in processes for _ in range(count) if kind.gpus), key=lambda k: -k.gpus)
    for kind in wanted:
        if not any(_placed(kind, node) for node in free):
            needs = ", ".join(f"{count} x {kind.name} of {kind.gpus:g}" for kind, count in processes if kind.gpus)
            raise ConfigError(
                f"The GPUs cannot hold all at once: there is no room for {kind.name}, which takes {kind.gpus:g} of "
                f"one and {kind.cpus:g} CPUs beside it: it would wait for ever",
                key=key,
                value=needs,
                rule="a part of a GPU is a part of one GPU, on a node with the CPUs that go with it; the nodes have "
                f"{', '.join(f'{len(node) - 1}' for node in free) or 'no'} GPUs",
                next_step="lower the number of actors, or the GPUs or CPUs that each reserves, or add nodes",
            )


def _placed(kind: Kind, node: list[float]) -> bool:
    """Whether a node, [free CPUs, free part of each GPU ...], had room; then it has less now."""
    if node[0] + 1e-6 < kind.cpus:
        return False
    share = min(kind.gpus, 1.0)
    # The fullest that suffices: whole ones stay whole.
    fitting = sorted((i for i in range(1, len(node)) if node[i] + 1e-6 >= share), key=lambda i: node[i])
    count = max(1, round(kind.gpus))
    if len(fitting) < count:
        return False
    node[0] -= kind.cpus
    for i in fitting[:count]:
        node[i] -= share
    return True


def check_devices(cluster: ClusterConfig, try_start: Callable[[], None] = lambda: None) -> None:
    """Before a job that reserves GPUs writes anything: that they compute, and that `try_start` succeeds beside one.

    Asked of every node with GPUs, in a process that reserves a little of one. ConfigError, or what `try_start`
    raised, when none can; nodes that cannot are named, and left to the job where others can. A cluster whose GPUs
    are all taken by other jobs does not answer: then the actors will say. In a rehearsal CUDA is not asked for.
    """
    nodes = {n["NodeID"]: n["NodeName"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU")}
    if cluster.device == "cpu":
        _log.warning(
            "REHEARSAL: cluster.device=cpu: what reserves GPUs computes on CPUs; none of the %d node(s) that declare "
            "GPUs is asked for one",
            len(nodes),
        )
    # One call a process: it would keep memory of the device.
    attempt = ray.remote(num_cpus=0, num_gpus=0.01, max_calls=1, max_retries=0)(_try_device)
    asked = {
        attempt.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            cluster, name, try_start
        ): name
        for node, name in nodes.items()
    }
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S) if asked else ([], [])
    for reference in silent:
        ray.cancel(reference, force=True)
    failures: dict[str, PipelineError] = {}
    for reference in answered:
        try:
            failure: PipelineError | None = ray.get(reference)
        except ray.exceptions.WorkerCrashedError as crash:
            failure = StoppedError(
                f"The process that tried its GPU died: {' '.join(str(crash).split())[:300]}",
                next_step="see the node's kernel log and Ray's worker logs, then run the same command again",
            )
        if failure is not None:
            failures[asked[reference]] = failure
    if failures and len(failures) == len(asked):
        raise next(iter(failures.values()))
    for name, error in failures.items():
        _log.warning("the GPUs of node %s cannot be used, the job goes on with others: %s", name, error.what)


def _try_device(cluster: ClusterConfig, node: str, try_start: Callable[[], None]) -> PipelineError | None:
    problem = cuda_problem() if cluster.device != "cpu" else None
    if problem is not None:
        return unusable_cuda(problem, f"node {node}", value=cluster.device)
    try:
        try_start()
    except PipelineError as error:
        return error
    except Exception as error:
        fault = device_fault(error)
        if fault is None:
            raise
        return stopped_by(fault, "A first try")
    return None
