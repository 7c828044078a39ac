"""A job's exit code and last line, whatever becomes of the process that does the work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.jobs import environment

pytestmark = pytest.mark.integration

MODULE = """
import os, signal, sys, time
from pathlib import Path
from pipeline.errors import StoppedError
from pipeline.result import JobResult

def run(config):
    Path("pid").write_text(str(os.getpid()))
    what = config.data.uri
    if what == "done":
        return JobResult("done", details={"text": "x" * 200_000})
    if what == "exit":
        os._exit(1)
    if what == "noise":
        noise = "E 7] core.cc:1: Actor 'x' has constructor arguments in the object store and max_restarts > 0. If"
        os.write(2, f"before\\n{noise}\\nbeneath\\n".encode())
        print(noise, file=sys.stderr)
        print("(Cleaner pid=1) Failed to query Ray Train Controller actor state. State API may be", file=sys.stderr)
        print("of Python", file=sys.stderr)
        os.write(2, b"last words")
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        time.sleep(60)
    except StoppedError:
        time.sleep(0.5)  # a second signal must not disturb the work of putting away
        raise
"""
START = """
import sys
from jobs._main import Job, main

main(Job("verify", "s", "pipeline.maintenance.config:VerifyJobConfig", "work:run", "work:run", "e"), sys.argv[1:])
"""


def start(folder: Path, what: str) -> subprocess.Popen[str]:
    (folder / "work.py").write_text(MODULE)
    return subprocess.Popen(
        [sys.executable, "-c", START, f"data.uri={what}"],
        cwd=folder,
        env={**environment(), "PYTHONPATH": f"{environment()['PYTHONPATH']}:{folder}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def worker_of(folder: Path) -> int:
    deadline = time.monotonic() + 60
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int((folder / "pid").read_text())


def test_an_answer_of_any_length_arrives(tmp_path: Path) -> None:
    process = start(tmp_path, "done")
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert len(json.loads(out.splitlines()[-1])["details"]["text"]) == 200_000
    assert worker_of(tmp_path) != process.pid


@pytest.mark.parametrize(("what", "cause"), [("exit", "ended with status 1"), ("kill", "killed by SIGKILL")])
def test_a_death_without_a_word_is_resumable(tmp_path: Path, what: str, cause: str) -> None:
    process = start(tmp_path, what)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    answer = json.loads(out.splitlines()[-1])
    assert (answer["status"], answer["exit_code"]) == ("stopped", 75)
    assert cause in answer["error"]
    assert "run the same command again" in errors
    assert "Traceback" not in errors


def test_sigterm_reaches_the_worker_once(tmp_path: Path) -> None:
    process = start(tmp_path, "wait")
    worker = worker_of(tmp_path)
    process.terminate()
    os.kill(worker, signal.SIGTERM)  # as a scheduler that signals the whole group does
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "Stopped by SIGTERM" in json.loads(out.splitlines()[-1])["error"]


def test_no_worker_outlives_the_command(tmp_path: Path) -> None:
    process = start(tmp_path, "wait")
    worker = worker_of(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_ray_says_of_its_own_actors_is_not_repeated(tmp_path: Path) -> None:
    process = start(tmp_path, "noise")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    lines = errors.split("\n")
    assert [line for line in lines if "constructor" in line] == []
    assert {"before", "beneath", "of Python"} <= set(lines)
    assert "last words" in errors, "what a process said before it was killed"
