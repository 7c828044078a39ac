"""Killing what a running job consists of, again and again, at moments and of kinds drawn from a seed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.support.jobs import start

# A job consists of the command that watches, the driver that it watches, and what the driver has started.
KINDS = {"actor": 6, "worker": 4, "driver": 2, "command": 1, "raylet": 1}


@dataclass
class Struck:
    """How often each kind of process was killed, and the outputs that a job finished by itself."""

    kills: dict[str, int] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.kills.values())


def victims(command: psutil.Process, kind: str) -> list[psutil.Process]:
    """Processes of a job: its pools' actors, any Ray worker, its driver, the command itself, or its raylet."""
    if kind == "command":
        return [command]
    found = []
    try:
        children = command.children(recursive=True)
        if kind == "driver":
            return [child for child in children if child.ppid() == command.pid]
    except psutil.NoSuchProcess:
        return []
    for child in children:
        try:
            line = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if {"actor": "MapWorker" in line, "worker": "ray::" in line, "raylet": "/raylet " in line}[kind]:
            found.append(child)
    return found


def disturb(
    job: str,
    arguments: Callable[[str], Sequence[str]],
    output: str,
    *,
    kills: int,
    seed: int,
    cwd: Path,
    under_way: Callable[[str], bool] = lambda output: True,
) -> Struck:
    """Run the job into `output` until it finishes by itself, killing something of it at random moments.

    A job that finishes before `kills` processes were killed goes on with a fresh output. Nothing is killed before
    `under_way(output)`: a run that is only starting proves nothing.
    """
    chance, struck = random.Random(seed), Struck()
    for _ in range(4 * kills + 4):
        process = start(job, *arguments(output), cwd=cwd)
        command = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(chance.uniform(0.2, 1.5))
            if struck.total >= kills:
                break
            kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
            if process.poll() is not None or not victims(command, "actor") or not under_way(output):
                continue
            alive = victims(command, kind)
            if alive and _kill(chance.choice(alive)):
                struck.kills[kind] = struck.kills.get(kind, 0) + 1
        _, errors = process.communicate(timeout=600)
        assert process.returncode in (0, 75, -signal.SIGKILL), errors
        if process.returncode == 0:
            struck.outputs.append(output)
            if struck.total >= kills:
                return struck
            output = f"{output}+"
    pytest.fail(f"the job never finished: {struck}")


def _kill(victim: psutil.Process) -> bool:
    try:
        os.kill(victim.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
