"""Faults of devices and their software are known by their words, and by a batch of known content where those fail."""

from __future__ import annotations

import pytest
import torch

from pipeline.dataflow.lost_device import DeviceFault, device_fault, stopped_by
from pipeline.errors import ConfigError, StoppedError

FAULTS = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb, m)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph."),
    RuntimeError("CUDA driver error: unknown error"),
    RuntimeError("CUDA NVRTC compile error: nvrtc: error: failed to open libnvrtc-builtins.so"),
    RuntimeError("nvrtc: error: invalid value for --gpu-architecture (-arch)"),
    RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR"),
    RuntimeError("cuFFT error: CUFFT_INTERNAL_ERROR"),
    RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error"),
    RuntimeError("No CUDA GPUs are available"),
    RuntimeError("The NVIDIA driver on your system is too old (found version 11040)."),
    RuntimeError("Found no NVIDIA driver on your system."),
    AssertionError("Torch not compiled with CUDA enabled"),
    RuntimeError("Cannot find a working triton installation."),
    DeviceFault("the codec gives latents that are not finite for known content"),
    torch._dynamo.exc.BackendCompilerFailed(lambda: None, ValueError("planted"), None),
    torch._inductor.exc.CppCompileError(["g++"], "planted"),
]


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: str(error)[:40])
def test_a_fault_is_known_by_its_words(error: Exception) -> None:
    assert device_fault(error) is not None
    wrapped = ValueError("a batch failed")
    wrapped.__cause__ = error
    told = device_fault(wrapped)  # whoever wraps it
    assert told is not None
    assert str(error).split()[0] in told


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a mistake"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        torch.OutOfMemoryError("CUDA out of memory."),
        OSError("cuda error"),
    ],
    ids=str,
)
def test_a_mistake_and_a_lack_of_memory_are_none(error: Exception) -> None:
    assert device_fault(error) is None


def test_what_a_job_says_of_it() -> None:
    stopped = stopped_by("RuntimeError: CUDA driver error: unknown error", "Encoding")
    assert isinstance(stopped, StoppedError)
    assert "nothing was rejected" in str(stopped)
    wrong = stopped_by("InductorError: CppCompileError: C++ compile error", "Encoding")
    assert isinstance(wrong, ConfigError)
    assert "codec.compile" in str(wrong)
