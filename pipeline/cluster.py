"""Connecting to Ray: the cluster named by RAY_ADDRESS, or one started on this machine for this job."""

from __future__ import annotations

import logging
import os
from typing import Any

from pydantic import Field

from pipeline.config import StrictModel
from pipeline.errors import InputError, StoppedError

# Several processes share the cores: OpenMP threads that spin while they wait steal them from each other.
WORKER_ENV = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "false"}


class ClusterConfig(StrictModel):
    """Where Ray tasks run."""

    num_cpus: int | None = Field(
        default=None, ge=1, description="CPUs offered by a locally started Ray; null: all of this machine's."
    )
    object_store_bytes: int | None = Field(
        default=None, ge=80 << 20, description="Object store of a locally started Ray, bytes; null: Ray's default."
    )
    dashboard: bool = Field(
        default=True, description="Serve the dashboard of a locally started Ray, on loopback only."
    )


def ensure_ray(cluster: ClusterConfig) -> Any:
    """Connect to RAY_ADDRESS when it is set, else start Ray here; returns the `ray` module.

    Already connected: nothing happens. Raises InputError when the named cluster cannot be reached.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    import ray

    if ray.is_initialized():
        return ray
    common: dict[str, Any] = {"runtime_env": {"env_vars": WORKER_ENV}, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, **common)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"The Ray cluster cannot be reached: {' '.join(str(error).split())[:300]}",
                key="RAY_ADDRESS",
                value=address,
                rule="RAY_ADDRESS names a running cluster of the same Ray version",
                next_step="start the cluster, correct the address, or unset RAY_ADDRESS to run on this machine",
            ) from None
        return ray
    try:
        ray.init(
            address="local",
            num_cpus=cluster.num_cpus,
            object_store_memory=cluster.object_store_bytes,
            include_dashboard=cluster.dashboard,
            dashboard_host="127.0.0.1",
            **common,
        )
    except Exception as error:  # noqa: BLE001 - Ray raises bare Exception when a process of its own does not come up
        raise StoppedError(
            f"Ray did not start on this machine: {' '.join(str(error).split())[:300]}",
            rule="starting Ray takes some free memory, disk space under /tmp and CPU time",
            next_step="see that the machine has room, then run the same command again",
        ) from None
    return ray


def shutdown_ray() -> None:
    """Disconnect, and stop the Ray that `ensure_ray` started here; nothing happens when none is connected."""
    import ray

    if ray.is_initialized():
        ray.shutdown()


def local_raylets() -> list[int]:
    """Process ids of the raylets this process has started; empty on a cluster that others run."""
    import psutil

    children = psutil.Process().children()
    return [c.pid for c in children if c.name() == "raylet" and c.status() != psutil.STATUS_ZOMBIE]
