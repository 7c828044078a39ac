"""A cluster of two nodes: what it tells Prometheus, and what becomes of a run when one node is lost."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pipeline.storage.root import Root
from tests.faults.encode_world import arguments, check
from tests.support.jobs import run, start
from tests.support.ray_nodes import RayNodes, ray_nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow]
FAST_METRICS = {"RAY_metrics_report_interval_ms": "500"}


def metrics(cluster: RayNodes) -> str:
    """What Prometheus would read from all nodes; nothing from one that does not answer."""
    found = ""
    for port in cluster.metrics_ports:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                found += answer.read().decode()
    return found


def seen_while_running(cluster: RayNodes, process: subprocess.Popen[str]) -> set[str]:
    """The names of the encode job's metrics that were there at some moment while it ran."""
    found: set[str] = set()
    while process.poll() is None and "ray_latentloom_encode_rows" not in " ".join(found):
        found |= set(re.findall(r"^(ray_latentloom_\w+)", metrics(cluster), re.MULTILINE))
        time.sleep(0.2)
    return found


def test_a_run_shows_its_metrics_and_survives_the_loss_of_a_node(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoders on both nodes; the survivor alone has no room for them all, and the run still finishes."""
    output = tmp_path / "latents"
    for name, value in FAST_METRICS.items():
        monkeypatch.setenv(name, value)
    with ray_nodes(2, 2) as cluster:
        command = arguments(base, output, **{"encode.actors": 3})
        process = start("encode", *command, cwd=base, env=cluster.env)
        root = Root(str(output))
        while process.poll() is None and not list(root.list("ledger")):
            time.sleep(0.05)
        names = seen_while_running(cluster, process)
        if process.poll() is None:
            cluster.raylet(1).kill()
        _, errors = process.communicate(timeout=300)
        assert process.returncode in (0, 75), errors
        assert any(name.startswith("ray_latentloom_encode_rows") for name in names), names
        if process.returncode == 75:  # it may give up, but only in good order
            code, _, errors = run(
                "encode", *arguments(base, output, **{"encode.actors": 1}), cwd=base, env=cluster.env
            )
            assert code == 0, errors
    check(base, output)
