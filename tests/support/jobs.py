"""Running jobs as their users do: as processes, judged by exit code and last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


def command(job: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"jobs.{job}", *map(str, arguments)]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    # What is on the path already may hold packages that this machine's Python lacks.
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return {**kept, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}


def start(job: str, *arguments: object, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(job, *arguments),
        cwd=cwd,
        env={**environment(), **(env or {})},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def completed(
    words: Sequence[str], cwd: Path, *, timeout: float = 120, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command run to its end, whatever its exit code."""
    variables = {**environment(), **(env or {})}
    return subprocess.run(words, cwd=cwd, env=variables, text=True, capture_output=True, timeout=timeout, check=False)


def run(
    job: str, *arguments: object, cwd: Path, timeout: float = 600, env: Mapping[str, str] | None = None
) -> tuple[int, dict[str, Any], str]:
    """(exit code, the JSON object on the last line of standard output, standard error)."""
    done = completed(command(job, *arguments), cwd, timeout=timeout, env=env)
    lines = done.stdout.strip().splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr
