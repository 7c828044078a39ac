"""Code that every Python process of a job runs first: faults and counters where a test could not reach otherwise."""

from __future__ import annotations

import textwrap
from pathlib import Path

from tests.support.jobs import REPOSITORY


def slow_disk(marked: str) -> str:
    """Code under which what is written below a folder with `marked` in its path comes slowly to its disk."""
    return f"""
        import os, time
        real = os.fsync
        def fsync(descriptor):
            if {marked!r} in os.readlink(f"/proc/self/fd/{{descriptor}}"):
                time.sleep(0.3)
            return real(descriptor)
        os.fsync = fsync
    """


def site_environment(folder: Path, code: str) -> dict[str, str]:
    """The environment variables under which Python starts with `code`, in the job and in all its Ray workers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(textwrap.dedent(code))
    return {"PYTHONPATH": f"{REPOSITORY}:{folder}"}
