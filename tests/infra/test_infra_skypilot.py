"""Managed jobs for those without Kubernetes: the night's own commands, read by SkyPilot's loader."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.infra.infra_files import BASE, INFRA, read, render
from tests.infra.infra_night import configurations, misfits, parsed, settings

pytestmark = pytest.mark.integration

SKYPILOT = {p.stem: p for p in sorted((INFRA / "skypilot").glob("*.yaml"))}


def test_managed_jobs_are_the_jobs_of_a_night_and_fit_them() -> None:
    """The same commands on one machine: in the place of the base's, the night still fits."""
    base = render(BASE)
    night, values = configurations(base), settings(base)
    assert set(SKYPILOT) == {"encode", "train", "sample"}
    for name, path in SKYPILOT.items():
        (task,) = read(path)
        before, _, entrypoint = task["run"].partition("python ")
        assert before == "cd /opt/latentloom && env -u RAY_ADDRESS "
        # Where things are is the user's; the rest is what the pods are told.
        told = {k: v for k, v in task["envs"].items() if not k.startswith("LATENTLOOM_") and k in values}
        assert told == {k: values[k] for k in told}
        assert {"AWS_REQUEST_CHECKSUM_CALCULATION", "GOMP_SPINCOUNT"} <= set(told)
        where = {k: values[k] for k in task["envs"] if k.startswith("LATENTLOOM_")}
        job, night[name] = parsed("python " + entrypoint, where)
        assert job == name
        assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75], "other codes are for a person"
    night["backfill"] = night["encode"]
    assert misfits(night) == []


def test_managed_jobs_by_skypilots_own_loader(tmp_path: Path) -> None:
    """SkyPilot wants an environment of its own: LATENTLOOM_SKYPILOT_PYTHON names its Python."""
    python = os.environ.get("LATENTLOOM_SKYPILOT_PYTHON")
    if not python:
        pytest.skip("LATENTLOOM_SKYPILOT_PYTHON names no Python with SkyPilot")
    script = Path(__file__).with_name("infra_skypilot_check.py")
    done = subprocess.run(
        [python, str(script), *map(str, SKYPILOT.values())],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert {name: task["spot"] for name, task in answer.items()} == {
        "latentloom-encode": True,
        "latentloom-sample": True,
        "latentloom-train": False,
    }
    assert all(task["recovery"]["recover_on_exit_codes"] == [75] for task in answer.values())
    assert answer["latentloom-sample"]["mounts"] == {
        "/var/lib/latentloom/networks": "s3://example-latentloom/networks"
    }
