"""Faults of devices and their software are known by their words, and by a batch of known content where those fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.dataflow.device_faults import DeviceFault, device_fault, stopped_by
from pipeline.errors import ConfigError, StoppedError
from tests.support.jobs import environment

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


FAILING = """
import torch
from pipeline.errors import ConfigError

def plain(config):
    raise RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")

def meant(config):
    try:
        plain(config)
    except RuntimeError as error:
        raise ConfigError("told by the job itself", key="some.key") from error
"""


@pytest.mark.parametrize(
    ("run", "code", "told"),
    [("plain", 75, "failed on its device: RuntimeError: cuDNN error"), ("meant", 2, "told by the job itself")],
)
def test_a_plain_process_stops_with_its_work_kept(tmp_path: Path, run: str, code: int, told: str) -> None:
    """One that embeds, evaluates or fits has no actor to replace; what the job itself makes of an error stays."""
    (tmp_path / "failing.py").write_text(FAILING)
    config = "pipeline.maintenance.config:VerifyJobConfig"
    program = (
        "from jobs._main import Job, main\n"
        f"main(Job('verify', 's', '{config}', 'failing:{run}', 'failing:{run}', 'e'), ['data.uri=x'])"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), text=True, capture_output=True, check=False)
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["exit_code"] == code
