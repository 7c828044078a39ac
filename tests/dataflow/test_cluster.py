"""A worker that computes on the CPU finds the memory it has freed there for its next batch."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from pipeline.dataflow.cluster import CPU_WORKER_ENV

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
