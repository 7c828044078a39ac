"""A Ray that a job starts on this machine: what listens where, and who may read its token."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.dataflow.cluster import private_folder, private_token

ROOT = Path(__file__).parents[2]
STARTED = """
import glob, logging, os, psutil
from pipeline.dataflow.cluster import CPU_WORKER_ENV, ClusterConfig, dashboard, ensure_ray, is_worker, shutdown_ray
from pipeline.dataflow.resources import device_options
logging.basicConfig(format="SAID %(message)s", level=logging.INFO)
assert device_options(0) == {"runtime_env": {"env_vars": CPU_WORKER_ENV}}
ray = ensure_ray(ClusterConfig(num_cpus=1, object_store_bytes=80 << 20), networks=True)
if not glob.glob("/dev/nvidia[0-9]*"):  # then all workers have what an actor with a network asks for
    assert device_options(0) == {}
    got = ray.get(ray.remote(lambda: dict(os.environ)).remote())
    assert CPU_WORKER_ENV.items() <= got.items() and not CPU_WORKER_ENV.items() <= os.environ.items()
assert (ray.get(ray.remote(is_worker).remote()), is_worker()) == (True, False)
print("FOLDER", ray._private.worker._global_node.get_session_dir_path())
for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
    for connection in process.net_connections("inet"):
        if connection.status == "LISTEN":
            print("LISTENS", connection.laddr.ip, process.name())
shutdown_ray()
assert dashboard() is None
assert device_options(0) == {"runtime_env": {"env_vars": CPU_WORKER_ENV}}
"""


@pytest.mark.ray
def test_it_listens_on_loopback_alone_and_keeps_its_token_private(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", STARTED], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    listening = [line.split() for line in done.stdout.splitlines() if line.startswith("LISTENS")]
    assert len(listening) >= 5, done.stderr[-2000:]
    (said,) = [line for line in done.stderr.splitlines() if "dashboard" in line]
    assert re.fullmatch(r"SAID Ray's dashboard: http://127\.0\.0\.1:\d+, until this job ends", said)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in listening if line[1] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")] == []
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    (session,) = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FOLDER")]
    assert Path(session).parents[1].stat().st_mode & 0o777 == 0o700


def test_its_folder_is_private_even_where_somebody_else_was_first(tmp_path: Path) -> None:
    mine = Path(private_folder(str(tmp_path)))
    mine.chmod(0o777)
    assert Path(private_folder(str(tmp_path))) == mine
    assert mine.stat().st_mode & 0o777 == 0o700
    mine.rmdir()
    (tmp_path / "trap").mkdir()
    mine.symlink_to(tmp_path / "trap")
    other = Path(private_folder(str(tmp_path)))
    assert other != mine
    assert other.stat().st_mode & 0o777 == 0o700


def test_a_token_that_others_may_read_is_made_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray" / "auth_token"
    private_token()
    first = token.read_text()
    assert (len(first), token.stat().st_mode & 0o777) == (64, 0o600)
    token.chmod(0o644)
    private_token()
    assert (token.read_text(), token.stat().st_mode & 0o777) == (first, 0o600)
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]


def test_a_token_of_the_operator_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 64)
    private_token()
    assert not (tmp_path / ".ray").exists()
