"""What a child that decodes or parses may do, and what becomes of one that answers what it should not."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.source.config import ImageConfig
from pipeline.source.pixels import prepare as preparing
from pipeline.source.pixels.child_process import Pool, _environment
from pipeline.source.pixels.prepare import Reject, prepare
from pipeline.source.reading.rows import SourceRow
from pipeline.source.reasons import Reason
from tests.security.hostile_images import encoded

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
CONFIG = ImageConfig(resolution=16, multiple_of=1, max_upscale=1e6, isolate="all")


def in_a_child(code: str, user: int | None = None) -> str:
    """What a confined process prints when it tries something, as this user or as another."""
    program = f"""
import ctypes, os, subprocess, sys, threading
from pipeline.source.pixels.child_process import limited_pipes
if {user is not None}:
    os.setuid({user or 0})
pipes = limited_pipes(2048)
try:
    {code}
except BaseException as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_a_child_sees_none_of_the_parents_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    assert set(_environment()) <= {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "LD_LIBRARY_PATH"}


def test_a_child_writes_no_file_and_gains_no_rights(tmp_path: Path) -> None:
    assert "File too large" in in_a_child(f"open({str(tmp_path / 'x')!r}, 'w').write('1' * 99999)")
    status = in_a_child("print(open('/proc/self/status').read())")
    assert "NoNewPrivs:\t1" in status


def test_a_child_has_no_network() -> None:
    interfaces = in_a_child("print(sorted(os.listdir('/proc/self/net')), open('/proc/self/net/dev').read())")
    if "eth0" in interfaces or "ens" in interfaces:
        pytest.skip("this kernel gives no network of its own to a process without rights")
    assert "OSError" in in_a_child("import socket; socket.create_connection(('127.0.0.1', 9), 2)")
    assert "unreachable" in in_a_child("import socket; socket.create_connection(('192.0.2.1', 9), 2)")


NOBODY, CALL = 65534, "ctypes.CDLL(None).syscall"
MAKES_A_PROCESS = {
    "fork": "os._exit(0) if os.fork() == 0 else print('made')",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {}); print('made')",
    "run": "subprocess.run(['/bin/true']); print('made')",
    "exec": "os.execv('/bin/echo', ['echo', 'made'])",
    "clone": f"print(['made', 'refused'][{CALL}({56 if platform.machine() == 'x86_64' else 220}, 17) < 0])",
    "clone3": f"print(['made', 'refused'][{CALL}(435, ctypes.create_string_buffer(88), 88) < 0])",
    "another numbering": f"print(['made', 'refused'][{CALL}(0x40000000 + 57) < 0])",
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the filter is Linux's")
@pytest.mark.parametrize("user", [None, NOBODY])
@pytest.mark.parametrize("way", MAKES_A_PROCESS)
def test_a_child_starts_no_process(way: str, user: int | None) -> None:
    if user is not None and os.getuid() != 0:
        pytest.skip("only a superuser may become another user")
    told = in_a_child(MAKES_A_PROCESS[way], user)
    assert "made" not in told
    assert "PermissionError" in told or "refused" in told


NUMBERS = (234, 200, 310) if platform.machine() == "x86_64" else (131, 130, 270)
AT = dict(zip(("tgkill", "tkill", "read"), NUMBERS, strict=True))
REACHES_OTHERS = {
    "kill": "os.kill(os.getppid(), 0); print('made')",
    "a thread of another": f"p = os.getppid(); print(['made', 'refused'][{CALL}({AT['tgkill']}, p, p, 0) < 0])",
    "any thread": f"print(['made', 'refused'][{CALL}({AT['tkill']}, os.getppid(), 0) < 0])",
    "memory": f"print(['made', 'refused'][{CALL}({AT['read']}, os.getppid(), 0, 0, 0, 0, 0) < 0])",
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the filter is Linux's")
@pytest.mark.parametrize("way", REACHES_OTHERS)
def test_a_child_reaches_into_no_other_process(way: str) -> None:
    told = in_a_child(REACHES_OTHERS[way])
    assert "made" not in told
    assert "PermissionError" in told or "refused" in told
    assert "sent" in in_a_child("import signal; signal.raise_signal(signal.SIGCHLD); print('sent')")


@pytest.mark.parametrize("user", [None, NOBODY])
def test_a_child_starts_threads(user: int | None) -> None:
    if user is not None and os.getuid() != 0:
        pytest.skip("only a superuser may become another user")
    several = "threads = [threading.Thread(target=print, args=('thread',)) for _ in range(4)]"
    told = in_a_child(f"{several}; [t.start() for t in threads]; [t.join() for t in threads]", user)
    assert told.count("thread") == 4


@pytest.mark.parametrize("name", ["numpy", "PIL"])
def test_files_of_the_current_directory_are_no_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('yes')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as python -m has it
    monkeypatch.setattr(
        preparing, "children", Pool(lambda memory: preparing._Decoder("pipeline.source.pixels.prepare", memory))
    )
    found = prepare(SourceRow(0, "a.png", encoded("PNG")), CONFIG)
    assert isinstance(found, list)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"outputs": [{"index": 0, "placement": [[1 << 20, 1 << 20], 0, 0, 1, 1], "original": [1, 1]}], "phash": None},
        {"outputs": [{"index": 9, "placement": [[16, 16], 0, 0, 1, 1], "original": [1, 1]}], "phash": None},
        {"outputs": "x", "phash": None},
        {"reason": "no such reason", "message": ""},
    ],
)
def test_an_answer_that_is_none_is_a_reject_and_the_childs_end(
    monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]
) -> None:
    ended = []

    class Lies(preparing._Decoder):
        def receive_header(self, deadline: float) -> dict[str, Any]:
            super().receive_header(deadline)
            return answer

        def kill(self) -> None:
            ended.append(self)
            super().kill()

    monkeypatch.setattr(preparing, "children", Pool(lambda memory: Lies("pipeline.source.pixels.prepare", memory)))
    found = prepare(SourceRow(0, "a.png", encoded("PNG")), CONFIG)
    assert isinstance(found, Reject)
    assert found.reason is Reason.DECODER_CRASHED
    assert ended
