"""The device benchmark: it runs with little installed, says what it is, and its clockwork is right without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.benchmarks.gpu.device import Bench, covered, fitting, kernel_spans, medians, nvidia_smi
from tests.support.bare_environment import with_requirements

pytestmark = pytest.mark.integration

INSTALLED = ("torch", "numpy", "pyarrow", "pillow", "fsspec", "diffusers")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench() -> Bench:
    """A CPU of one FLOP/s."""
    return Bench(torch.device("cpu"), "float32", (False,), warmup=1, peak=1.0)


def test_it_runs_where_only_torch_and_a_few_more_are_installed(tmp_path: Path) -> None:
    command = ["tests.benchmarks.gpu", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.bare_environment", ",".join(INSTALLED), *command],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    used = json.loads(done.stdout.splitlines()[-1])
    assert set(used) <= with_requirements(INSTALLED)
    assert not {"pydantic", "ray", "mlflow", "transformers"} & set(used)

    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {"cpu", "cores", "gpu", "python", "commit", "versions"} <= found["machine"].keys()
    assert {"torch", "diffusers"} <= found["machine"]["versions"].keys()
    assert found["scale"] == "quick"
    assert found["device"]["type"] == "cpu"
    assert found["device"]["measured_peak_flops"] > 0
    assert any("full-size networks are not taken" in note for note in found["notes"])
    assert any("no picture" in note for note in found["notes"]), "matplotlib is not among what is installed there"
    assert "full-size networks are not taken" in done.stdout
    areas = found["areas"]
    assert {name: len(rows) for name, rows in areas.items()} == {
        "encode": 2,
        "train_step": 1,
        "forward_backward": 1,
        "sample": 1,
    }
    for name, rate in (
        ("encode", "bare_images_per_s"),
        ("train_step", "steps_per_s"),
        ("forward_backward", "diffusers_images_per_s"),
        ("sample", "bare_images_per_s"),
    ):
        for row in areas[name]:
            assert row[rate] > 0
            assert row["images_per_s"] > 0
            assert row["of_measured_peak"] > 0
            assert row["batch"] == 2
            assert "tiny" in row.get("codec", row.get("model"))
            # What only a GPU can tell is absent rather than made up.
            assert row["of_datasheet_peak"] is None
            assert row.get("device_busy") is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--areas", "encode,decode"], "no such area: decode"),
        (["--device", "cuda"], "torch sees no CUDA device"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.benchmarks.gpu.__main__ import parse

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        parse(arguments)
    assert said in capsys.readouterr().err


def test_memory_that_runs_out_halves_the_batch_and_is_told(bench: Bench) -> None:
    tried = []

    def attempt(batch: int) -> str:
        tried.append(batch)
        if batch > 3:
            raise torch.OutOfMemoryError("planted")
        return "done"

    assert fitting(bench, "encode", 12, attempt) == (3, "done")
    assert tried == [12, 6, 3]
    assert bench.notes == [
        "encode: out of memory with batch 12, tried again with 6",
        "encode: out of memory with batch 6, tried again with 3",
    ]


def test_one_image_that_does_not_fit_is_left_out(bench: Bench) -> None:
    def attempt(batch: int) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")

    assert fitting(bench, "train", 2, attempt) is None
    assert bench.notes[-1] == "train: out of memory with one image, left out"


def test_a_network_that_cannot_be_compiled_is_left_out(bench: Bench) -> None:
    class CompilerFailed(RuntimeError):
        __module__ = "torch._dynamo.exc"

    def attempt(batch: int) -> None:
        raise CompilerFailed("planted: no C compiler\nand a long trace")

    assert fitting(bench, "train", 8, attempt) is None
    assert bench.notes == ["train: left out, torch.compile failed: planted: no C compiler"]


def test_another_error_is_no_matter_of_memory(bench: Bench) -> None:
    def attempt(batch: int) -> None:
        raise RuntimeError("planted: a shape is wrong")

    with pytest.raises(RuntimeError, match="a shape is wrong"):
        fitting(bench, "train", 8, attempt)
    assert bench.notes == []


def test_sides_take_turns_after_their_warm_up(bench: Bench) -> None:
    calls: list[str] = []
    seconds = medians(bench, 2, {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert min(seconds.values()) >= 0


def test_time_in_which_kernels_ran_counts_once() -> None:
    assert covered([]) == 0
    assert covered([(0, 10), (20, 30)]) == 20
    assert covered([(5, 6), (0, 10), (8, 12), (12, 13)]) == 13


def test_of_a_profile_only_kernels_count() -> None:
    def event(name: str, kind: Any = torch.autograd.DeviceType.CUDA, annotation: bool = False) -> SimpleNamespace:
        span = SimpleNamespace(start=1.0, end=2.0)
        return SimpleNamespace(name=name, device_type=kind, is_user_annotation=annotation, time_range=span)

    events = [
        event("ampere_bf16_gemm"),
        event("Memcpy HtoD (Pinned -> Device)"),
        event("Memset (Device)"),
        event("Optimizer.step#AdamW.step", annotation=True),
        event("cudaLaunchKernel", torch.autograd.DeviceType.CPU),
    ]
    assert kernel_spans(events) == [(1.0, 2.0)]


def test_the_profiler_gives_what_is_read_of_it() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        torch.ones(4, 4) @ torch.ones(4, 4)
    assert len(profile.events()) > 0
    assert kernel_spans(profile.events()) == []


def test_the_clock_leaves_out_the_warm_up_and_the_profiled_round(bench: Bench) -> None:
    from tests.benchmarks.gpu.train import Clock

    times: Iterator[float] = iter([0.0, 2.0, 5.0, 9.0, 109.0])
    clock = Clock(bench, rounds=3)
    bench.now = lambda: next(times)  # type: ignore[method-assign]
    for _ in range(clock.rounds):
        clock({})
    assert clock.seconds == 3.0
    assert next(times, None) is None


def test_the_driver_is_asked_by_its_own_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_smi("GPU-0") is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '570.1, 700.00 W, 1980 MHz, 2619 MHz'\n")
    tool.chmod(0o755)
    assert nvidia_smi("GPU-0") == {
        "driver_version": "570.1",
        "power.limit": "700.00 W",
        "clocks.max.sm": "1980 MHz",
        "clocks.max.memory": "2619 MHz",
    }
    tool.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert nvidia_smi("GPU-0") is None
