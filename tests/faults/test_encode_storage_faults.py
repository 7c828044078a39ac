"""A disk that fills up or fails in the middle of a write: a clear error, nothing half-visible, and a way on.

And the reads are counted: what is finished is not read again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.storage.root import Root
from pipeline.store.ledger.state import read_state
from pipeline.store.maintain.verify import verify
from pipeline.store.plan import read_entries
from tests.faults.encode_world import arguments, check
from tests.support.jobs import run, start
from tests.support.site import site_environment

pytestmark = pytest.mark.ray

FAILING_FSYNC = """
    import errno, os
    real = os.fsync
    def fsync(descriptor):
        if os.path.exists(os.environ["FAIL_WHILE"]) and "/data/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor)
    os.fsync = fsync
"""
COUNTING_OPEN = """
    import os, sys
    log = os.open(os.environ["OPENED"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    place = os.environ["WATCHED"]
    def hook(event, arguments):
        if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(place):
            os.write(log, arguments[0].encode() + b"\\n")
    sys.addaudithook(hook)
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 KiB: the plan fits, the dataset does not."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def only_unfinished(uri: Path) -> bool:
    """Whether what is visible is sound, and something is still to be done."""
    return {p["kind"] for p in verify(str(uri), "checksums").problems} == {"unfinished"}


def test_a_full_disk_stops_the_job_and_more_room_lets_it_go_on(base: Path, small_disk: Path) -> None:
    output = small_disk / "latents"
    code, _, errors = run("encode", *arguments(base, output), cwd=base)
    assert code == 3, errors
    assert "No space left on device" in errors
    assert "free space, then run the same command again" in errors
    assert "Traceback" not in errors
    assert only_unfinished(output)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    code, _, errors = run("encode", *arguments(base, output), cwd=base)
    assert code == 0, errors
    check(base, output)


def test_an_io_error_in_the_middle_of_a_write(base: Path, tmp_path: Path) -> None:
    output, failing = tmp_path / "latents", tmp_path / "failing"
    env = {**site_environment(tmp_path / "site", FAILING_FSYNC), "FAIL_WHILE": str(failing)}
    failing.touch()
    code, _, errors = run("encode", *arguments(base, output), cwd=base, env=env)
    assert code == 3, errors
    assert "Input/output error" in errors
    assert "then run the same command again" in errors
    assert "Traceback" not in errors
    assert only_unfinished(output)
    failing.unlink()
    code, _, errors = run("encode", *arguments(base, output), cwd=base, env=env)
    assert code == 0, errors
    check(base, output)


def test_finished_units_are_not_opened_again(base: Path, tmp_path: Path) -> None:
    """The driver is killed half-way; the second run opens every unsettled image once and no settled one."""
    output, opened = tmp_path / "latents", tmp_path / "opened"
    env = {
        **site_environment(tmp_path / "site", COUNTING_OPEN),
        "OPENED": str(opened),
        "WATCHED": f"{base / 'images'}/",
    }
    process = start("encode", *arguments(base, output, **{"encode.actors": 1}), cwd=base, env=env)
    root = Root(str(output))
    while process.poll() is None and len(list(root.list("ledger"))) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2)  # its workers notice and end
    state = read_state(root)
    settled = {
        entry.key
        for unit in range(state.plan.next_unit)
        for entry in read_entries(root, state.plan.locate(unit))
        if any(a <= entry.first_row < b for a, b in state.covered.of_unit(unit))
    }
    names = {p.name for p in (base / "images").iterdir() if p.suffix == ".png"}
    assert 0 < len(settled) < len(names)
    opened.write_bytes(b"")
    code, _, errors = run("encode", *arguments(base, output), cwd=base, env=env)
    assert code == 0, errors
    reads = Counter(os.path.basename(line) for line in opened.read_text().splitlines())
    assert {name for name in reads if name.endswith(".png")} == names - settled
    assert {count for name, count in reads.items() if name.endswith(".png")} == {1}
    check(base, output)
