"""Logs: the sidecar that shows what Ray writes to files, run on a folder; the component that puts it beside Ray."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.infra.infra_files import INFRA, PLACES, ray_job_specs, ray_templates, render

pytestmark = pytest.mark.integration

SHOW = INFRA / "docker" / "show_logs.py"
LOGGED = [p for p in PLACES if "logs" in p.name]


@pytest.mark.parametrize("place", LOGGED, ids=lambda p: p.name)
def test_every_pod_of_a_cluster_shows_its_logs_and_may_do_nothing_else(place: Path) -> None:
    for name, spec in ray_job_specs(render(place)).items():
        for group, template in ray_templates(spec).items():
            pod = template["spec"]
            sidecars = [c for c in pod.get("initContainers", []) if c["name"] == "logs"]
            assert len(sidecars) == (group != "submitter"), (name, group)
            for sidecar in sidecars:
                assert sidecar["restartPolicy"] == "Always"
                assert sidecar["image"] == pod["containers"][0]["image"], "no node loads an image for it"
                assert not {"env", "envFrom"} & set(sidecar)
                assert sidecar["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp", "readOnly": True}]
                assert sidecar["command"] == ["python", f"/opt/latentloom/{SHOW.name}"]


def test_its_images_hold_it() -> None:
    for name in ("Dockerfile", "Dockerfile.cpu"):
        assert f"infra/docker/{SHOW.name}" in (INFRA / "docker" / name).read_text()
        assert f"!infra/docker/{SHOW.name}" in (INFRA / "docker" / f"{name}.dockerignore").read_text().split()


def wait_for(what: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 30
    while not what():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.05)


def test_every_line_is_shown_once_also_when_files_are_rotated(tmp_path: Path) -> None:
    logs = tmp_path / "ray" / "session_1" / "logs"
    (logs / "old").mkdir(parents=True)
    (tmp_path / "ray" / "session_latest").symlink_to("session_1")
    driver, raylet, shown = logs / "job-driver-1.log", logs / "raylet.out", tmp_path / "shown"
    driver.write_text("first\nsecond, unfi")
    raylet.write_text("one\n")
    (logs / "pids.json").write_text("{}\n")
    with shown.open("wb") as out:
        process = subprocess.Popen([sys.executable, str(SHOW), str(tmp_path / "ray")], stdout=out)

    def lines() -> list[tuple[str, str]]:
        complete = shown.read_bytes().split(b"\n")[:-1]
        return [(entry["file"].rpartition("/")[2], entry["line"]) for entry in map(json.loads, complete)]

    try:
        wait_for(lambda: len(lines()) == 2)
        with driver.open("ab") as file:
            file.write(b"nished\n" + b"x" * 600_000 + b"\nnot text: \xff\n")
        raylet.rename(logs / "raylet.out.1")
        with (logs / "raylet.out.1").open("ab") as file:
            file.write(b"two\n")
        raylet.write_text("three\n")
        wait_for(lambda: ("job-driver-1.log", "not text: \ufffd") in lines())
        with raylet.open("ab") as file:
            file.write(b"its last words")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
    of_raylet = sorted(line for file, line in lines() if file.startswith("raylet"))
    assert of_raylet == ["its last words", "one", "three", "two"]
    of_driver = [line for file, line in lines() if file == "job-driver-1.log"]
    assert of_driver[:2] == ["first", "second, unfinished"]
    # A line without an end is cut, not held.
    assert "".join(of_driver[2:-1]) == "x" * 600_000
    assert {file for file, _ in lines()} == {"job-driver-1.log", "raylet.out", "raylet.out.1"}
