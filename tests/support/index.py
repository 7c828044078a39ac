"""Whether packages can be had from an index, by pip as this machine configures it."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest


@functools.cache
def _problem() -> str | None:
    words = [sys.executable, "-m", "pip", "--retries", "1", "--timeout", "15", "index", "versions", "pip"]
    done = subprocess.run(words, text=True, capture_output=True, check=False)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no answer"])[-1]


def needs_index() -> None:
    """Skip where pip does not even learn of its own releases."""
    if problem := _problem():
        pytest.skip(f"no package index can be reached: {problem}")
