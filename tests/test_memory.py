"""A process told to keep freed memory finds its pages there for the next batch."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, threading
from pipeline.memory import keep_freed_memory
import torch

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def batches():
    for _ in range(10):
        torch.ones(6 << 20)  # 24 MiB, below glibc's largest threshold for blocks of their own
        torch.ones(24 << 20)  # 96 MiB, above it

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    batches()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

batches()
found = [faults()]
thread = threading.Thread(target=lambda: (batches(), found.append(faults())))
thread.start()
thread.join()
print(*found)
"""


def page_faults(mode: str) -> list[int]:
    """Of ten rounds in the main thread, and of ten in another."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.integration
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
def test_kept_memory_is_not_mapped_anew() -> None:
    as_it_is, kept = page_faults("as it is"), page_faults("keep")
    assert all(few * 20 < many for few, many in zip(kept, as_it_is, strict=True)), (kept, as_it_is)
