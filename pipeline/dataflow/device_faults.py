"""Faults of a device and of the software that drives it: how they are known, and what a process does that meets one.

Such a fault says nothing about the data. Rows that were being worked on stay open; an actor ends, as a crash would
end it, and Ray starts another in its place with a context of its own; a plain process stops with its work kept; so
does a job whose Ray ends. Torch is imported where an error has to be judged: who reads and writes does without it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import ConfigError, PipelineError, StoppedError

DEVICE_GONE = 70  # exit status of a process whose device failed; EX_SOFTWARE

# What CUDA, its libraries and compilers say in plain RuntimeErrors, lower-cased: PyTorch has a class of its own for
# errors of the runtime API alone (torch.AcceleratorError, 2.8 and later).
_FAULTS = (
    "cuda error",
    "cuda driver error",
    "cuda driver initialization failed",
    "cuda unknown error",
    "cublas_status_",
    "cublaslt",
    "cudnn error",
    "cudnn_status_",
    "cudnn frontend",
    "cusolver",
    "cusparse_status_",
    "cufft_",
    "curand_status_",
    "nvrtc",
    "nvjitlink",
    "nvml_",
    "nccl error",
    "triton error",
    "device-side assert",
    "no cuda gpus are available",
    "no nvidia driver",
    "nvidia driver on your system",
    "not compiled with cuda",
    "working triton installation",
    "hip error",
)
# Packages whose own exceptions mean that code for the device could not be made, whatever is in them.
_COMPILERS = ("triton", "torch._inductor", "torch._dynamo")


class DeviceFault(Exception):
    """The device, its driver or a compiler failed where no data are to blame, as a batch of known content showed."""


def device_fault(error: BaseException) -> str | None:
    """What happened, in one line, when an error or one it came from is a device's or its software's; else None.

    A lack of memory is none: a smaller batch may help.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return None  # who has not loaded it has no device
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if out_of_memory(cause):
            return None
        accelerator = getattr(torch, "AcceleratorError", ())  # from 2.8 on
        text = str(cause).lower() if isinstance(cause, RuntimeError | AssertionError) else ""
        if (
            isinstance(cause, (DeviceFault, accelerator))
            or type(cause).__module__.startswith(_COMPILERS)
            or any(words in text for words in _FAULTS)
        ):
            return f"{type(cause).__name__}: {' '.join(str(cause).split())[:500]}"
        cause = cause.__cause__ or cause.__context__
    return None


def stopped_by(fault: str, doing: str) -> PipelineError:
    """What a job says that a fault ended: ConfigError where the configuration asked for what cannot be made here."""
    if any(name in fault.lower() for name in ("inductor", "triton", "dynamo")):
        return ConfigError(
            f"{doing} failed in a compiler: {fault}",
            rule="torch.compile needs a Triton and an Inductor that fit the installed torch and driver",
            next_step="set the job's compile (codec.compile, model.compile, train.compile) to false, or mend the "
            "installation; nothing was rejected, what was committed is kept",
        )
    return StoppedError(
        f"{doing} failed on its device: {fault}",
        rule="a fault of a device or its software is no fault of the data: nothing was rejected, what was committed "
        "is kept",
        next_step="see to the device (nvidia-smi, dmesg, its driver), then run the same command again",
    )


def ended_with_ray(error: BaseException) -> StoppedError | None:
    """What a job says that met the end of Ray's processes, its own or the cluster's; None for any other error.

    Actors whose code raised as they started have not ended so.
    """
    ray = sys.modules.get("ray")
    if ray is None:
        return None
    of = ray.exceptions
    ends = (of.RayActorError, of.LocalRayletDiedError, of.NodeDiedError, of.WorkerCrashedError, of.OutOfMemoryError)
    if not isinstance(error, (*ends, of.OwnerDiedError, of.RpcError, of.GetTimeoutError)):
        return None
    if getattr(error, "actor_init_failed", False):
        return None
    return StoppedError(
        f"Ray, or a process that it keeps for this job, is gone: {' '.join(str(error).split())[:300]}",
        rule="what was committed is kept",
        next_step="see that the cluster is up and its machines have memory and disk space left (Ray's logs tell "
        "more), then run the same command again",
    )


@contextmanager
def ends_with_its_device(who: str, tell: Callable[[str], None] = lambda fault: None) -> Iterator[None]:
    """End this process when a fault of its device passes, as a crash would; every other error passes.

    After an illegal access, an ECC error or a lost bus the device's context is gone, and only a new process gets a
    new one. An error that is raised does not end an actor, and would pass for a mistake in the code. `tell` hears
    of the fault before: whoever looks for data that kill processes must not take these for such.
    """
    try:
        yield
    except Exception as error:
        fault = device_fault(error)
        if fault is None:
            raise
        sys.stderr.write(f"latentloom: the device failed, this {who} ends and is replaced: {fault}\n")
        sys.stderr.flush()
        try:
            tell(fault)
        finally:  # whoever should hear of it may be gone, too
            os._exit(DEVICE_GONE)


def cuda_problem() -> str | None:
    """Why this process cannot compute on CUDA, with the versions that have to fit; None when it can."""
    import torch

    try:
        torch.ones(1, device="cuda").add_(1).item()
    except Exception as error:  # noqa: BLE001 - AssertionError, RuntimeError and AcceleratorError, by version
        lines = str(error).strip().splitlines()
        cause = f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"
        return f"driver {driver_version() or 'none'}, torch.version.cuda {torch.version.cuda}: {cause}"
    return None


def driver_version() -> str | None:
    """The version of this machine's NVIDIA driver, None where none is loaded."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(errors="replace")
    except OSError:
        return None
    version = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return version.group(1) if version else None


def unusable_cuda(problem: str, where: str, key: str = "cluster.device", value: str = "auto") -> ConfigError:
    """The error of a job whose GPUs do not compute; `problem` as `cuda_problem` tells it."""
    return ConfigError(
        f"CUDA does not work on {where}: {problem}",
        key=key,
        value=value,
        rule="a process that reserves a GPU computes on it: torch must be a build for CUDA, and the driver as new as "
        "torch.version.cuda asks",
        next_step="install a driver and a torch that fit each other; cluster.device=cpu rehearses the same run on "
        "CPUs; to use no GPU at all, reserve none",
    )


# -- Which errors mean that memory ran out: the one answer that encoding and sampling share --------------------


# What PyTorch's CPU allocators, CUDA, cuBLAS and cuDNN say in a plain RuntimeError, lower-cased. When all of cuDNN's
# engines lack memory, PyTorch says that there is none; cuBLAS without room for its handle, that it has none.
_MEMORY_WORDS = (
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
    # Where torch was never loaded, it has raised nothing.
    device_memory = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    if isinstance(error, (MemoryError, device_memory)):
        return True
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    return any(words in text for words in _MEMORY_WORDS)
