"""A Ray cluster of several nodes on this machine, started as an operator would, for tests that take one away."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.processes import Daemon, free_port

RAY = str(Path(sys.executable).with_name("ray"))
# Apart from each other: nodes of one machine must not hand out the same ports.
_FIRST_WORKER_PORT, _PORTS_PER_NODE = 20_000, 1_000


@dataclass
class RayNodes:
    """The cluster's address, the ports of its nodes' Prometheus metrics, and one daemon a node, the head first.

    `token` is what everybody who talks to it must know.
    """

    address: str
    metrics_ports: list[int]
    token: str
    daemons: list[Daemon]
    folder: Path

    def add(self, cpus: int, gpus: int = 0) -> None:
        """One node more."""
        if len(self.metrics_ports) == len(self.daemons):
            self.metrics_ports.append(free_port())
        _start(self, len(self.daemons), cpus, gpus)

    @property
    def env(self) -> dict[str, str]:
        """The environment variables with which a job works on it."""
        return {"RAY_ADDRESS": self.address, **self.access}

    @property
    def access(self) -> dict[str, str]:
        """What its nodes need to trust each other."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def raylet(self, number: int) -> psutil.Process:
        """The raylet process of a node."""
        process = self.daemons[number].process
        assert process is not None
        children = psutil.Process(process.pid).children(recursive=True)
        return next(c for c in children if c.name() == "raylet")


@contextmanager
def ray_nodes(*cpus: int, gpus: Sequence[int] = ()) -> Iterator[RayNodes]:
    """A cluster whose head and further nodes have so many CPUs each; gone at the end, by process id.

    `gpus`: GPUs that each node declares, whether there are any or not; none when left out.
    """
    folder = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))  # sockets need short paths
    nodes = RayNodes(f"127.0.0.1:{free_port()}", [free_port() for _ in cpus], secrets.token_hex(32), [], folder)
    try:
        for number, count in enumerate(cpus):
            nodes.add(count, gpus[number] if gpus else 0)
        yield nodes
    finally:
        for daemon in reversed(nodes.daemons):
            daemon.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _start(nodes: RayNodes, number: int, cpus: int, gpus: int) -> None:
    folder, first = nodes.folder, _FIRST_WORKER_PORT + number * _PORTS_PER_NODE
    port = nodes.address.rpartition(":")[2]
    head = ["--head", f"--port={port}", "--include-dashboard=false"]
    role = head if number == 0 else [f"--address={nodes.address}"]
    command = [
        *(RAY, "start", *role, "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"),
        *(
            f"--num-cpus={cpus}",
            f"--num-gpus={gpus}",
            f"--temp-dir={folder / str(number)}",
            "--object-store-memory=200000000",
        ),
        f"--metrics-export-port={nodes.metrics_ports[number]}",
        *(f"--min-worker-port={first}", f"--max-worker-port={first + _PORTS_PER_NODE - 1}"),
    ]
    daemon = Daemon(command, folder / f"node-{number}.log")
    daemon.start(env={**os.environ, **nodes.access}, cwd=folder)
    nodes.daemons.append(daemon)
    deadline = time.monotonic() + 180
    while "Ray runtime started" not in daemon.log.read_text(errors="replace"):
        assert daemon.alive, daemon.tail()
        assert time.monotonic() < deadline, daemon.tail()
        time.sleep(0.2)
