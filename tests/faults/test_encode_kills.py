"""Kill anything at any moment: the finished dataset holds every row once, byte for byte as if nothing had happened.

`pytest tests/faults -m soak --kills 200 --kill-seed 7` makes a longer run of it.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from pipeline.store.verify import verify
from tests.faults.encode_world import arguments, check
from tests.support.jobs import start

pytestmark = pytest.mark.ray

# What is struck how often: encoder actors, any process of Ray's workers, the driver, the whole command, the raylet.
KINDS = {"actor": 6, "worker": 4, "driver": 2, "command": 1, "raylet": 1}


def victims(command: psutil.Process, kind: str) -> list[psutil.Process]:
    """The living processes of one kind that belong to a command."""
    if kind == "command":
        return [command]
    try:
        children = command.children(recursive=True)
        if kind == "driver":
            return [c for c in children if c.ppid() == command.pid]
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if _is(child, kind)]


def _is(process: psutil.Process, kind: str) -> bool:
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:
        return False
    marks = {"actor": "MapWorker", "worker": "ray::", "raylet": "/raylet "}
    return marks[kind] in line


def strike(chance: random.Random, command: psutil.Process) -> str | None:
    """Kill something; returns what kind, or None when there was nothing of the kind drawn.

    The driver and what it stands on are struck only while encoders live: a run that is only starting proves nothing.
    """
    kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
    if kind not in ("actor", "worker") and not victims(command, "actor"):
        return None
    found = victims(command, kind)
    if not found:
        return None
    try:
        chance.choice(found).kill()
    except psutil.NoSuchProcess:
        return None
    return kind


def disturb(base: Path, place: Path, kills: int, seed: int) -> tuple[dict[str, int], list[Path]]:
    """Run the job again and again, killing inside, until `kills` are dealt and it has finished by itself.

    Returns the kills by kind and the finished datasets: a run that ends before the quota is used up is followed
    by one into a fresh root.
    """
    chance = random.Random(seed)
    struck: dict[str, int] = {}
    finished: list[Path] = []
    for _ in range(4 * kills + 4):
        output = place / f"killed-{len(finished)}"
        process = start("encode", *arguments(base, output, **{"encode.actors": 2}), cwd=base)
        command = psutil.Process(process.pid)
        while process.poll() is None and sum(struck.values()) < kills:
            time.sleep(chance.uniform(0.3, 2.5))
            kind = strike(chance, command) if process.poll() is None else None
            if kind:
                struck[kind] = struck.get(kind, 0) + 1
        _, errors = process.communicate(timeout=600)
        assert process.returncode in (0, 75, -signal.SIGKILL), errors
        if process.returncode == 0:
            finished.append(output)
            if sum(struck.values()) >= kills:
                return struck, finished
    pytest.fail(f"the job never finished: {struck}")


@pytest.mark.parametrize("seed", [1, 2])
def test_random_kills_lose_and_repeat_nothing(base: Path, tmp_path: Path, seed: int) -> None:
    struck, finished = disturb(base, tmp_path, kills=10, seed=seed)
    print("killed:", struck)
    assert sum(struck.values()) >= 10
    for output in finished:
        check(base, output)


@pytest.mark.soak
def test_soak(base: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    seed, kills = request.config.getoption("--kill-seed"), request.config.getoption("--kills")
    struck, finished = disturb(base, tmp_path, kills=kills, seed=seed)
    print("killed:", struck, "in", len(finished), "finished runs")
    for output in finished:
        check(base, output)
        assert verify(str(output), "checksums").sound
