"""A process told to keep freed memory finds its pages there for the next batch."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from pipeline.cluster import CPU_WORKER_ENV

SCRIPT = """
import resource, sys, threading
from pipeline.memory import keep_freed_memory
import torch

def batches():
    for _ in range(10):
        torch.ones(6 << 20)  # 24 MiB, below glibc's largest threshold for blocks of their own
        torch.ones(24 << 20)  # 96 MiB, above it

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    batches()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def measure(found):
    batches()
    found.append(page_faults())

if sys.argv[1] == "call":
    assert keep_freed_memory()
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


def page_faults(how: str, **environment: str) -> list[int]:
    """Of ten rounds in the main thread, and of ten in one of many others."""
    command = [sys.executable, "-c", SCRIPT, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return [int(word) for word in done.stdout.split()]


@pytest.mark.integration
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
def test_kept_memory_is_not_mapped_anew() -> None:
    plain = page_faults("as it is")
    assert page_faults("call")[0] * 20 < plain[0]
    worker = page_faults("as it is", **CPU_WORKER_ENV)
    assert all(few * 20 < many for few, many in zip(worker, plain, strict=True)), (worker, plain)
