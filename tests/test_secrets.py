"""Credentials that a job is given do not come out of it again; and Ray listens to this machine alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.jobs import REPOSITORY, command, environment, run
from tests.support.processes import free_port

pytestmark = pytest.mark.integration

PLANTED = "planted-Secret-77"
TALKATIVE = """
import logging, os

def run(config):
    secret = os.environ["SOME_SERVICE_PASSWORD"]
    logging.getLogger("pipeline.test").warning("connecting with %s to ftp://me:other-Secret@host", secret)
    raise ValueError(f"login with {secret} failed")
"""


def tracked(uri: str) -> list[str]:
    return [f"tracking.uri={uri}", "tracking.journal_dir=journal"]


@pytest.mark.parametrize(
    ("job", "arguments", "expected"),
    [
        ("lineage", [f"start={'ab' * 16}"], 3),
        ("sync_tracking", [], 0),  # nothing waits for the server that does not answer
        ("promote", ["evaluation.uri=report", "model.name=m", "at_least.accuracy=0.5"], 3),
    ],
)
def test_a_tracking_servers_password_is_in_no_message(
    tmp_path: Path, job: str, arguments: list[str], expected: int
) -> None:
    from pipeline.evaluate.figures import Record

    (tmp_path / "journal").mkdir()
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "evaluation.json").write_bytes(Record("k", (), {}, {}, {}, (), {}).to_bytes())
    uri = f"http://me:{PLANTED}@127.0.0.1:{free_port()}"
    code, answer, errors = run(job, *arguments, *tracked(uri), cwd=tmp_path, timeout=300)
    assert code == expected, errors
    assert "does not answer" in errors
    assert "Traceback" not in errors
    assert PLANTED not in errors + str(answer)
    assert all(PLANTED not in p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file())


def test_a_printed_configuration_masks_it(tmp_path: Path) -> None:
    arguments = [*tracked(f"postgresql://me:{PLANTED}@db/mlflow"), "--print-config"]
    done = subprocess.run(
        command("sync_tracking", *arguments),
        cwd=tmp_path,
        env=environment(),
        text=True,
        capture_output=True,
        check=True,
    )
    assert "postgresql://***@db/mlflow" in done.stdout
    assert PLANTED not in done.stdout + done.stderr


def test_messages_and_tracebacks_are_masked(tmp_path: Path) -> None:
    (tmp_path / "talkative.py").write_text(TALKATIVE)
    code = (
        "from jobs._main import Job, main\n"
        "main(Job('verify', 's', 'pipeline.maintenance.config:VerifyJobConfig', 'talkative:run', 'talkative:run',"
        " 'e'), ['data.uri=x'])"
    )
    variables = environment() | {"SOME_SERVICE_PASSWORD": PLANTED}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=variables, text=True, capture_output=True, check=False
    )
    assert done.returncode == 1
    assert "connecting with *** to ftp://***@host" in done.stderr
    assert "ValueError: login with *** failed" in done.stderr
    assert PLANTED not in done.stdout + done.stderr


def test_ray_listens_on_loopback_and_keeps_its_token_authentication(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    from pipeline.dataflow.cluster import ClusterConfig, ensure_ray

    seen: dict[str, Any] = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def start(**options: Any) -> SimpleNamespace:
        seen.update(options, inherited=dict(os.environ))
        return SimpleNamespace(dashboard_url="")

    monkeypatch.setattr(ray, "init", start)
    ensure_ray(ClusterConfig())
    assert (seen["address"], seen["dashboard_host"]) == ("local", "127.0.0.1")
    assert not [name for name in seen["inherited"] if name.startswith("RAY_AUTH")], "what Ray's processes start with"
    # What the cluster's operator chose stays: one place looks at it, which sends the token where nobody chose.
    sources = [p for folder in ("pipeline", "jobs") for p in (REPOSITORY / folder).rglob("*.py")]
    assert len(sources) > 100
    touching = [p for p in sources if "RAY_AUTH_MODE" in p.read_text()]
    assert [p.name for p in touching] == ["cluster.py"]
    assert re.findall(r'RAY_AUTH_MODE"\] = (.*)', touching[0].read_text()) == ['"token"']
