"""Two runs on one output: at once, one after the other stopped, and one that comes back from the dead."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

import psutil
import pytest

from pipeline.storage.root import Root
from pipeline.store.ledger.ledger import visible_records
from tests.faults.encode_world import IMAGES, arguments, check
from tests.support.jobs import run, start

pytestmark = pytest.mark.ray


def family(pid: int) -> list[psutil.Process]:
    """A process and all it has started."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def send(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def test_two_drivers_at_once(base: Path, tmp_path: Path) -> None:
    """One goes on, the other stops with exit code 4, and nothing is lost."""
    both = [start("encode", *arguments(base, tmp_path / "two"), cwd=base) for _ in range(2)]
    outcomes = [p.communicate(timeout=600) for p in both]
    assert sorted(p.returncode for p in both) == [0, 4], outcomes
    check(base, tmp_path / "two")


def test_a_zombie_comes_back_and_stays_invisible(base: Path, tmp_path: Path) -> None:
    """A run frozen in the middle counts as dead; thawed after another has taken over, it ends with a conflict."""
    output = tmp_path / "contested"
    root = Root(str(output))
    zombie = start("encode", *arguments(base, output, **{"encode.actors": 1}), cwd=base)
    while zombie.poll() is None and not list(root.list("ledger")):
        time.sleep(0.02)
    frozen = family(zombie.pid)
    send(frozen, signal.SIGSTOP)
    assert zombie.poll() is None
    try:
        code, answer, errors = run("encode", *arguments(base, output), cwd=base)
        assert code == 0, errors
        assert answer["counts"]["latents"] == IMAGES
        before = [name for name, _ in visible_records(root)]
    finally:
        send(frozen, signal.SIGCONT)
    _, errors = zombie.communicate(timeout=300)
    assert zombie.returncode in (4, 75), errors
    assert "taken over" in errors or zombie.returncode == 75
    assert [name for name, _ in visible_records(root)] == before
    check(base, output)


def test_sigterm_stops_with_75_and_the_same_command_goes_on(base: Path, tmp_path: Path) -> None:
    process = start("encode", *arguments(base, tmp_path / "spot"), cwd=base)
    root = Root(str(tmp_path / "spot"))
    while process.poll() is None and not list(root.list("ledger")):
        time.sleep(0.1)
    process.terminate()
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert '"status": "stopped"' in out.strip().splitlines()[-1]
    code, answer, errors = run("encode", *arguments(base, tmp_path / "spot"), cwd=base)
    assert code == 0, errors
    assert answer["counts"]["latents"] == IMAGES
    check(base, tmp_path / "spot")
