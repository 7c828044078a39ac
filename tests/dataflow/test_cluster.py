"""Workers: memory that is freed stays there for the next batch, and modules are found in the driver's order."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
from pipeline.dataflow.cluster import CPU_WORKER_ENV, DriversPath

SCRIPT = """
import resource, threading
import numpy as np

def batches():
    for _ in range(10):
        np.ones(6 << 20, np.float32)  # 24 MiB, below glibc's largest threshold for blocks of their own
        np.ones(24 << 20, np.float32)  # 96 MiB, above it

def measure(found):
    batches()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    batches()
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

found = []
measure(found)
# A worker's threads: many, which have allocated before.
go = threading.Barrier(12)
threads = [threading.Thread(target=lambda: (bytes(1 << 20), go.wait())) for _ in range(11)]
work = threading.Thread(target=lambda: (bytes(1 << 20), go.wait(), measure(found)))
for thread in (*threads, work):
    thread.start()
for thread in (*threads, work):
    thread.join()
print(*found)
"""


def page_faults(**environment: str) -> list[int]:
    """Of ten rounds in the main thread, and of ten in one of many others."""
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=env)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.integration
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
def test_freed_memory_is_kept_and_not_mapped_anew() -> None:
    worker, plain = page_faults(**CPU_WORKER_ENV), page_faults()
    assert all(few * 20 < many for few, many in zip(worker, plain, strict=True)), (worker, plain)


def workers_path(places: list[str], own: list[str]) -> list[str]:
    """Where a Ray worker looks for modules: Ray puts the job's places before its own, one after the other."""
    path = list(own)
    for place in places:
        path.insert(0, place)
    return path


def test_workers_look_where_the_driver_looks_and_in_its_folder_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/env/bin", "/lib/python", "/lib/site-packages", str(tmp_path)])
    places = DriversPath()
    places.extend(["/env/bin", str(tmp_path)])
    home = str(Path(pipeline.__file__).parents[1])
    expected = ["/lib/python", "/lib/site-packages", home, str(tmp_path), "/env/bin"]
    assert workers_path(places, ["/lib/python"])[:5] == expected


def test_in_a_checkout_workers_look_there_first(monkeypatch: pytest.MonkeyPatch) -> None:
    home = str(Path(pipeline.__file__).parents[1])
    monkeypatch.chdir(home)
    places = DriversPath()
    places.extend([home])
    assert workers_path(places, ["/lib/site-packages"]) == [home, "/lib/site-packages"]
