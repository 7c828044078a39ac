"""Memory that runs out: recognised by whatever says so, never an image's fault, told as a wrong configuration."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.dataflow.device_faults import out_of_memory
from pipeline.errors import ConfigError
from pipeline.sample import denoise
from pipeline.sample.denoise import LatentDecoder
from pipeline.sample.stages import DecodeLatents, DecoderSpec, DenoiseBlocks, DenoiserSpec
from tests.support.draws import DRAW
from tests.support.monitor import LocalMonitor

SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 123 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", SHORTAGES, ids=str)
def test_every_way_of_saying_so_is_understood(error: Exception) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("no algorithm found"), ValueError("out of memory"), OSError("full")])
def test_other_errors_are_no_shortage(error: Exception) -> None:
    assert not out_of_memory(error)


def latents(count: int = 3) -> pa.Table:
    one = np.zeros((4, 2, 2), np.float32).tobytes()
    shapes = pa.array([[4, 2, 2]] * count, pa.list_(pa.int32(), 3))
    where = {"unit": pa.array([0] * count, pa.int64()), "row": pa.array(range(count), pa.int64())}
    return pa.table({**where, "latent": pa.array([one] * count, pa.large_binary()), "latent_shape": shapes})


@pytest.mark.parametrize("error", SHORTAGES, ids=str)
def test_a_decoder_without_memory_rejects_no_image(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(latents_NCHW: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(denoise, "load_codec", lambda *_, **__: SimpleNamespace(decode=exhausted))
    with pytest.raises(type(error)):
        LatentDecoder("nowhere", batch_size=4)(latents())
    blocks = DecodeLatents(DecoderSpec("nowhere", "auto", None, DRAW), LocalMonitor())
    with pytest.raises(ConfigError, match=r"Decoding ran out of memory[\s\S]*batch_size = 4[\s\S]*lower batch_size"):
        blocks(latents())


def test_a_denoiser_without_memory_names_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(block: pa.Table, on_batch: Any) -> pa.Table:
        raise SHORTAGES[0]

    monkeypatch.setattr(denoise.Denoiser, "load", lambda *_, **__: exhausted)
    blocks = DenoiseBlocks(DenoiserSpec("nowhere", None, DRAW), LocalMonitor())
    with pytest.raises(ConfigError, match=r"Denoising ran out of memory") as caught:
        blocks(latents())
    assert caught.value.exit_code == 2
    carried = pickle.loads(pickle.dumps(caught.value))  # as Ray brings it to the driver
    assert (carried.key, carried.value) == ("batch_size", 4)


def test_a_model_that_does_not_fit_is_told_to_the_monitor(monkeypatch: pytest.MonkeyPatch, local_ray: None) -> None:
    """Another device may hold it: the process ends, and the job when none can."""

    def load(*_: Any, **__: Any) -> None:
        raise SHORTAGES[-1]

    monkeypatch.setattr(denoise.Denoiser, "load", load)
    monitor = LocalMonitor(denoiser=1)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"Loading the model ran out of memory[\s\S]*model\.dtype = float32"):
            DenoiseBlocks(DenoiserSpec("nowhere", None, DRAW), monitor)
    assert isinstance(monitor.state.totals()[1], ConfigError)
    monkeypatch.setattr(denoise.Denoiser, "load", lambda *_, **__: fails_otherwise)
    with pytest.raises(RuntimeError, match="another fault"):
        DenoiseBlocks(DenoiserSpec("nowhere", None, DRAW), LocalMonitor())(latents())


def fails_otherwise(block: pa.Table, on_batch: Any) -> pa.Table:
    raise RuntimeError("another fault")
