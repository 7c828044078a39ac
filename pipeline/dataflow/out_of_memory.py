"""Which errors mean that memory ran out: the one answer that encoding and sampling share."""

from __future__ import annotations

import torch

# What PyTorch's CPU allocators, CUDA, cuBLAS and cuDNN say in a plain RuntimeError, lower-cased. When all of cuDNN's
# engines lack memory, PyTorch says that there is none; cuBLAS without room for its handle, that it has none.
_TOLD = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "alloc_failed",
    "allocation_failed",
    "unable to find an engine",
    "cublas_status_not_initialized",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether host or device memory ran out: no fault of the data, a smaller batch may help."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    return any(words in text for words in _TOLD)
