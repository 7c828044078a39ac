"""Host memory: what a process that computes on the CPU does with it, and which errors mean that it ran out."""

from __future__ import annotations

import ctypes
import platform

import torch

# Of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8

# What PyTorch's CPU allocators, CUDA, cuBLAS and cuDNN say in a plain RuntimeError, in lower case.
_TOLD = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


def out_of_memory(error: BaseException) -> bool:
    """Whether host or device memory ran out: no fault of the data, a smaller batch may help."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    return any(words in text for words in _TOLD)


def keep_freed_memory() -> bool:
    """Let this process keep memory that is freed, for its next batch; False where the C library is not glibc.

    By default glibc maps each large block anew and gives it back when freed, so that a network on the CPU has the
    kernel clear its activations' pages again and again: a tenth of the time of a VAE. For processes whose batches
    have few shapes, which is when what is kept is also used; they stay as large as they have once been. To be called
    before other threads allocate: each has its arena already, and only the first one holds large blocks. Workers are
    started so instead (`pipeline.cluster.CPU_WORKER_ENV`).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(name, value) == 1 for name, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)))
