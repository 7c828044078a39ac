"""A Ray cluster on loopback as its operators start it: `ray start` as processes of ours, ended by their ids."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import psutil

from tests.support.processes import Daemon, free_port

START_TIMEOUT_S = 240.0
_BIN = Path(sys.executable).parent


class RayCluster:
    """A head that holds the dashboard, and workers; token authentication, ports and a temporary folder of its own."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        # Not below pytest's folder: sockets lie here, whose paths must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="llray-"))
        self.port, self.dashboard_port = free_port(), free_port()
        self.token = secrets.token_hex(24)
        self.metrics_ports: list[int] = []
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            **environment,
            "PATH": f"{_BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_JOB_STOP_WAIT_TIME_S": "300",
            "RAY_metrics_report_interval_ms": "1000",
            # A machine that is busy with other tests starts nodes slowly.
            "RAY_agent_register_timeout_ms": "240000",
        }
        self._daemons: list[Daemon] = []
        self._seen: set[psutil.Process] = set()

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def start_head(self, *options: str) -> None:
        """The head, which offers no CPU, and wait until it is healthy."""
        self._start(
            "--head",
            f"--port={self.port}",
            "--num-cpus=0",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard_port}",
            f"--ray-client-server-port={free_port()}",
            f"--temp-dir={self.folder}",
            *options,
        )
        self._until_healthy(f"{self.dashboard}/api/gcs_healthz")

    def start_worker(self, num_cpus: int) -> None:
        """One more node, and wait until it is healthy."""
        self._start(f"--address=127.0.0.1:{self.port}", f"--num-cpus={num_cpus}")

    def metrics(self) -> str:
        """What Prometheus would get of all nodes."""
        texts = []
        for port in self.metrics_ports:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                    texts.append(answer.read().decode())
            except OSError:
                continue  # a node that is busy is asked again at the next scrape
        return "\n".join(texts)

    def status_of(self, path: str, token: str | None) -> int:
        """The HTTP status of the dashboard for a path, with a token or without one."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.dashboard + path, headers=headers), timeout=30
            ) as got:
                return int(got.status)
        except urllib.error.HTTPError as error:
            return error.code

    def stop(self) -> None:
        """End every process that was started here and what they started, and remove their files."""
        for daemon in self._daemons:
            if daemon.process is not None and daemon.alive:
                parent = psutil.Process(daemon.process.pid)
                self._seen |= {parent, *parent.children(recursive=True)}
        for daemon in reversed(self._daemons):
            daemon.stop()
        for process in self._seen:
            if process.is_running():  # compares the start time, too: an id that was given anew is another process
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, *options: str) -> None:
        self.metrics_ports.append(free_port())
        agent_port = free_port()
        # Nodes of one machine must not meet on the ports that have fixed defaults.
        low = 20000 + 1000 * len(self._daemons) + os.getpid() % 500
        command = [
            str(_BIN / "ray"),
            "start",
            "--block",
            "--disable-usage-stats",
            "--node-ip-address=127.0.0.1",
            *options,
        ]
        command += [f"--metrics-export-port={self.metrics_ports[-1]}", f"--dashboard-agent-listen-port={agent_port}"]
        command += [f"--min-worker-port={low}", f"--max-worker-port={low + 400}", "--object-store-memory=200000000"]
        daemon = Daemon(command, self.folder / f"node-{len(self._daemons)}.log")
        self._daemons.append(daemon)
        daemon.start(env=self.environment, cwd=self.folder)
        # The agent comes last, and without it no job can be submitted.
        self._until_healthy(f"http://127.0.0.1:{agent_port}/api/local_raylet_healthz")

    def _until_healthy(self, url: str) -> None:
        give_up = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < give_up and all(d.alive for d in self._daemons):
            try:
                with urllib.request.urlopen(url, timeout=30) as answer:
                    if b"success" in answer.read():
                        return
            except OSError:
                time.sleep(0.5)
        said = self.said()
        self.stop()
        raise RuntimeError(f"Ray did not start ({url}):\n{said}")

    def said(self) -> str:
        """The end of what the nodes said."""
        return "\n".join(d.tail() for d in self._daemons)
