"""A stage of sampling whose device is lost ends its process, as a crash would: Ray replaces actors that die."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch

from pipeline.dataflow.device_faults import DEVICE_GONE
from pipeline.dataflow.passes import run_execution
from pipeline.sample import denoise
from pipeline.sample.stages import DecodeLatents, DecoderSpec, DenoiseBlocks, DenoiserSpec, EmbedPrompts
from pipeline.text import encoder
from tests.sample.test_shortage import latents
from tests.support.draws import DRAW
from tests.support.monitor import LocalMonitor


class Ended(BaseException):
    """In place of the end of this process."""


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch, local_ray: None) -> None:
    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr("pipeline.dataflow.device_faults.os._exit", end)


def decoder(patch: pytest.MonkeyPatch, work: Callable[..., Any]) -> Callable[[], Any]:
    patch.setattr(denoise, "load_codec", lambda *_, **__: SimpleNamespace(decode=work))
    return lambda: DecodeLatents(DecoderSpec("nowhere", "auto", None, DRAW), LocalMonitor())(latents())


def denoiser(patch: pytest.MonkeyPatch, work: Callable[..., Any]) -> Callable[[], Any]:
    patch.setattr(denoise.Denoiser, "load", lambda *_, **__: work)
    return lambda: DenoiseBlocks(DenoiserSpec("nowhere", None, DRAW), LocalMonitor())(latents())


def embedder(patch: pytest.MonkeyPatch, work: Callable[..., Any]) -> Callable[[], Any]:
    patch.setattr(encoder, "PromptEmbedder", lambda *_, **__: work)
    return lambda: EmbedPrompts(SimpleNamespace(), DRAW, 0, LocalMonitor()).embed(["a"])  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [decoder, denoiser, embedder])
def test_a_lost_device_ends_the_process(
    stage: Callable[..., Callable[[], Any]],
    monkeypatch: pytest.MonkeyPatch,
    ending: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def lost(*_: Any, **__: Any) -> pa.Table:
        raise torch.AcceleratorError("planted: uncorrectable ECC error encountered")

    with pytest.raises(Ended, match=str(DEVICE_GONE)):
        stage(monkeypatch, lost)()
    assert f"this {stage.__name__}" in capsys.readouterr().err.replace("embedder of prompts", "embedder")


@pytest.mark.parametrize("stage", [denoiser, embedder])
def test_another_fault_is_raised_as_what_it_is(
    stage: Callable[..., Callable[[], Any]], monkeypatch: pytest.MonkeyPatch, ending: None
) -> None:
    def broken(*_: Any, **__: Any) -> pa.Table:
        raise RuntimeError("planted: another fault")

    with pytest.raises(RuntimeError, match="planted: another fault"):
        stage(monkeypatch, broken)()


def test_an_actor_that_died_under_the_code_that_asked_it_is_a_death_and_no_mistake() -> None:
    def fails(cause: Exception) -> Callable[[], None]:
        def execute() -> None:
            raise ray.exceptions.RayTaskError("denoise", "the traceback", cause)

        return execute

    assert run_execution(fails(ray.exceptions.ActorDiedError())) is not None
    with pytest.raises(ray.exceptions.RayTaskError):
        run_execution(fails(ValueError("planted: a mistake")))
